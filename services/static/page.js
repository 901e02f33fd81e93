// Keeps the part of a page that changes (#live) up to date while somebody looks at it: it is fetched again, as the
// server renders it, when the sweep's events say that there is news, or every few seconds. Without it, pages are whole.
"use strict";
(() => {
  const LEAST_MS = 1000; // between two fetches
  const MOST_MS = 10000;
  const AGAIN_MS = 5000; // after one that failed
  const SAY_MS = 10000; // between two lines of progress that a screen reader speaks

  const said = document.getElementById("said");
  let live = document.getElementById("live");
  if (!live || !said) return;
  const [shown, aloud] = said.querySelectorAll("span"); // the second is for who cannot see the page change

  let source = null; // of events
  let seq = Number(live.dataset.seq || 0);
  let timer = 0; // of the next fetch
  let retry = 0; // of the next connection
  let least = LEAST_MS;
  let fetched = 0; // when
  let held = false; // a button of the mouse, or a finger, is down
  let over = false; // nothing more will come
  let spoken = { state: "", at: 0 };

  function say(text, progress = "", lost = false) {
    said.classList.toggle("lost", lost);
    if (shown.textContent !== text) shown.textContent = text;
    if (aloud.textContent !== progress) aloud.textContent = progress;
  }

  function tell() {
    const { said: progress, state, every } = live.dataset;
    if (every) return say("Up to date; looks again every " + every + " s.");
    if (over) return say("Nothing more comes by itself.", progress);
    if (!source || source.readyState !== EventSource.OPEN) return;
    const now = Date.now();
    if (said.classList.contains("lost") || state !== spoken.state || now - spoken.at > SAY_MS) {
      spoken = { state, at: now };
      say("Live: kept up to date.", progress);
    }
  }

  function lost(words) {
    say(words, "", true);
  }

  // -- the part of the page

  function soon(wait = 0) {
    if (timer || document.hidden) return;
    timer = setTimeout(refresh, Math.max(wait, fetched + least - Date.now()));
  }

  function busy() {
    const selection = getSelection();
    return held || (selection && !selection.isCollapsed && live.contains(selection.anchorNode));
  }

  async function refresh() {
    timer = 0;
    if (busy()) return soon(LEAST_MS);
    fetched = Date.now();
    try {
      const answer = await fetch(live.dataset.fragment, { headers: { Accept: "text/html" } });
      if (answer.status === 401) return leave("You are logged out. Reload the page to log in.");
      if (answer.status === 404) return leave("This is no longer here.");
      if (!answer.ok) throw new Error(answer.status);
      const text = await answer.text();
      const took = Date.now() - fetched;
      least = Math.min(Math.max(LEAST_MS, 10 * took), MOST_MS); // a server that is slow is asked less
      if (busy()) return soon(LEAST_MS);
      swap(new DOMParser().parseFromString(text, "text/html").getElementById("live"));
      tell();
      if (live.dataset.every) soon(1000 * live.dataset.every);
    } catch {
      lost("The connection is lost; trying again.");
      soon(AGAIN_MS);
    }
  }

  function swap(fresh) {
    if (!fresh || fresh.isEqualNode(live)) return;
    const key = (node) => node.id || node.getAttribute("href");
    const focused = live.contains(document.activeElement) ? key(document.activeElement) : null;
    const scrolled = [...live.querySelectorAll(".scroll")].map((box) => [box.id, box.scrollLeft]);
    live.replaceWith(fresh);
    live = fresh;
    for (const [id, left] of scrolled) {
      const box = document.getElementById(id);
      if (box) box.scrollLeft = left;
    }
    if (focused) {
      const again = [...live.querySelectorAll("a, button, [tabindex]")].find((node) => key(node) === focused);
      (again || document.getElementById("content")).focus({ preventScroll: true });
    }
  }

  // -- events

  function listen() {
    if (source || over || !live.dataset.events || document.hidden) return;
    source = new EventSource(live.dataset.events + "?after=" + seq);
    source.onopen = () => {
      if (said.classList.contains("lost")) soon();
      tell();
    };
    source.onerror = () => {
      lost("The connection is lost; trying again.");
      if (source.readyState !== EventSource.CLOSED) return; // it tries again by itself
      close();
      soon(); // says so if the token has expired
      retry = setTimeout(listen, AGAIN_MS);
    };
    for (const kind of live.dataset.kinds.split(" ")) {
      source.addEventListener(kind, (event) => {
        seq = Math.max(seq, Number(event.lastEventId));
        if (kind === "end") {
          over = true;
          close();
        }
        soon();
      });
    }
  }

  function close() {
    clearTimeout(retry);
    if (source) source.close();
    source = null;
  }

  function leave(words) {
    over = true;
    close();
    lost(words);
  }

  // A browser has few connections to one server: a page that nobody looks at gives its own back.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      close();
      clearTimeout(timer);
      timer = 0;
    } else if (live.dataset.events || live.dataset.every) {
      soon();
      listen();
    }
  });
  document.addEventListener("pointerdown", () => (held = true));
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => (held = false));

  if (live.dataset.every) {
    tell();
    soon(1000 * live.dataset.every);
  } else if (live.dataset.events) {
    listen();
  }
})();
