from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from sweeps.errors import Fault, SpecError
from sweeps.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, dotted, read_yaml, shown

_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
_JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)


class _Representer(SafeRepresenter):
    """Quotes text that begins like a key or a value; the parser, unlike YAML 1.2, does not read it plain in `{}`."""

    def represent_str(self, text: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if text[:1] in (":", "?") else None)


_Representer.add_representer(str, _Representer.represent_str)


def _dumped(value: object, *, flow: bool) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = flow
    stream = io.StringIO()
    yaml.dump({"value": value}, stream)
    return stream.getvalue()


@given(_JSON_LIKE, st.booleans())
@example({":0": None}, True)
@example({"?a": None}, True)
def test_a_value_dumped_as_yaml_reads_back_equal(value: object, flow: bool) -> None:
    assert read_yaml(_dumped(value, flow=flow), "f").value == {"value": value}


@given(_JSON_LIKE, st.booleans())
def test_a_value_dumped_as_json_reads_back_equal(value: object, ascii_only: bool) -> None:
    assert read_yaml(json.dumps([value], ensure_ascii=ascii_only), "f").value == [value]


_WORDS = r"[ ] { } , : - ? | > & * ! % @ # ' a 1 << --- ... &a *a !!str !<x> %TAG %YAML \u12 .nan 0x"
_PIECES = st.sampled_from([*_WORDS.split(), " ", ": ", "- ", "\n", "\n  ", "\t", '"', "\x85", "\ufeff"])


@given(st.text(max_size=30) | st.lists(_PIECES, max_size=14).map("".join))
@example("%YAML 1.3\n--- a")
@example("%YAML " + "1" * 5000 + ".1\n--- a")
@example('"\\UFFFFFFFF"')
@example("a: \ud800")
@example("9" * 5000)
def test_arbitrary_text_raises_nothing_but_a_spec_error_with_lines(text: str) -> None:
    faults: tuple[Fault, ...] = ()
    try:
        read_yaml(text, "f")
    except SpecError as error:
        faults = error.faults
    assert all(fault.line is not None for fault in faults)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("~", None),
        ("TRUE", True),
        ("2024-01-01", "2024-01-01"),
        ("'1e-5'", "1e-5"),
        ("null", None),
        ("", None),
        ("1:30", "1:30"),
    ],
)
def test_plain_scalars_follow_the_core_schema_of_yaml_1_2(written: str, value: object) -> None:
    found = read_yaml(f"key: {written}", "f").value
    assert found == {"key": value}
    assert isinstance(found, dict)
    assert type(found["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "path", "words"),
    [
        ("a: 1\nb: &x 2", 2, "b", "without anchors; found the anchor 'x'"),
        ("a: 1\nb: *x", 2, "b", "without aliases; found the alias 'x'"),
        ("a: 1\nb: !!python/object/apply:os.system [x]", 2, "b", "without tags"),
        ("a: ! 1", 1, "a", "without tags"),
        ("a: !<tag:yaml.org,2002:int> 1", 1, "a", "without tags"),
        ("%TAG ! tag:x,2000:\n---\na: 1", 2, "", "without directives"),
        ("%YAML 1.1\n---\na: yes", 2, "", "without directives"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", 4, "a.b", "each key once; found a second one; the first is on line 2"),
        ("a: 1\n2: 3", 2, "", "keys that are text; found the key 2; put it in quotes"),
        ("a: 1\ntrue: 3", 2, "", "keys that are text; found the key true"),
        ("? [a, b]\n: 1", 1, "", "keys that are text"),
        ("a: .nan", 1, "a", "finite numbers; found .nan"),
        ("a: [1,\n -.inf]", 2, "a[1]", "finite numbers; found -.inf"),
        ("a: 1e999", 1, "a", "finite numbers; found 1e999"),
        ("a: 9223372036854775808", 1, "a", "at most 64 bits"),
        ("a: 1\n---\nb: 2", 2, "", "one document"),
        ("", 1, "", "a YAML document; found nothing but"),
        ("# only this\n", 2, "", "a YAML document; found nothing but"),
        ("---\n", 2, "", "a YAML document; found an empty one"),
        ("a: 1\n b: 2", 2, "", "YAML that can be parsed; found mapping values are not allowed here"),
        ("a:\n  - 1\n  b: 2", 3, "", "look at the indentation"),
        ("a: 1\nb: [1,\nc: 2", 3, "", "YAML that can be parsed; found while parsing a flow sequence"),
        ("a: 1\nb: \0", 2, "", "YAML that can be parsed; found the character U+0000"),
        ('a: "\\ud800"', 1, "a", "Unicode text; found half a character"),
        ("a: " + "[" * 40 + "]" * 40, 1, "a" + "[0]" * (MAX_DEPTH - 1), "at most 32 levels"),
        ("a:\n- " + "!" * 1000, 2, "", "without tags"),
        ("- 1\n" * (MAX_VALUES + 1), MAX_VALUES, f"[{MAX_VALUES - 1}]", "at most 20,000 values"),
        ("x" * (MAX_BYTES + 1), 1, "", "at most 1,048,576 bytes; found 1,048,577"),
    ],
)
def test_what_a_plain_value_does_not_need_is_refused_with_its_line(text: str, line: int, path: str, words: str) -> None:
    with pytest.raises(SpecError, match="required") as caught:
        read_yaml(text, "f.yaml")
    fault = caught.value.faults[0]
    assert (fault.line, fault.path) == (line, path)
    assert words in fault.render("f.yaml")


def test_faults_that_do_not_stop_the_reading_come_together() -> None:
    with pytest.raises(SpecError, match="anchor") as caught:
        read_yaml("a: &x 1\nb: *x\nc: .nan\na: 2\n", "f")
    assert [fault.line for fault in caught.value.faults] == [1, 2, 3, 4]


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_exhausts_neither_the_stack_nor_the_clock(opening: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(SpecError, match="levels of nesting"):
        read_yaml(opening * (MAX_BYTES // len(opening)), "f")
    assert time.monotonic() - start_s < 20


def test_a_plain_key_that_begins_with_a_colon_is_refused_in_braces_and_read_elsewhere() -> None:
    assert read_yaml("a:\n  :0: 1", "f").value == read_yaml("a: {':0': 1}", "f").value == {"a": {":0": 1}}
    with pytest.raises(SpecError, match="required keys that are text"):
        read_yaml("a: {:0: 1}", "f")


def test_every_path_has_its_line_and_an_unknown_one_that_of_its_parent() -> None:
    text = read_yaml("# head\na:\n  b:\n    - 1\n    - {c: 2}\n", "f")
    assert text.lines == {(): 2, ("a",): 2, ("a", "b"): 3, ("a", "b", 0): 4, ("a", "b", 1): 5, ("a", "b", 1, "c"): 5}
    assert text.line_of(("a", "b", 1, "d", "e")) == 5
    assert text.line_of(("z",)) == 2


def test_paths_and_values_are_shown_on_one_line_and_cannot_garble_a_terminal() -> None:
    assert dotted(("parameters", "rank", "values", 0)) == "parameters.rank.values[0]"
    assert dotted(("a", "\x1b[2J")) == r"a.'\x1b[2J'"
    assert shown("\n" * 99) == "'" + r"\n" * 28 + "..."
    assert shown({"a": [1, None, True]}) == "{a: [1, nothing, true]}"


def test_reading_loads_none_of_the_heavy_libraries() -> None:
    code = "import sys, sweeps.spec; print(sorted({'torch', 'ray', 'optuna', 'mlflow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
