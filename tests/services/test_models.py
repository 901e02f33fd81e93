"""A language model and its data under the administrator's roots: trained by the service, and known by their ids."""

from __future__ import annotations

from pathlib import Path

from tests.services.service_support import serving
from tests.sweeps.hf_support import make_gpt2, write_jsonl

SPEC = """\
name: answers
task:
  type: causal_lm
  model: team/gpt2
  data: {train: answers.jsonl, eval: 0.25}
  loss: completion
lora: {target_modules: [c_attn]}
parameters: {rank: {values: [2, 4]}, lr: {min: 1e-3, max: 1e-1}, alpha: {values: [4, 16]}}
train: {optimizer: adamw, steps: 2, batch_size: 2}
search: {method: random, trials: 2, pruner: {type: none}}
certify: {classes: 1, steps: 1}
compute: {workers: 1, pack: 2}
"""


def test_a_model_of_the_server_is_trained_and_nobody_learns_where_it_lies(tmp_path: Path):
    models, data = tmp_path / "roots" / "models", tmp_path / "roots" / "data"
    (models / "team").mkdir(parents=True)
    data.mkdir()
    make_gpt2(models / "team" / "gpt2")
    write_jsonl(data / "answers.jsonl", [{"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}."} for n in range(12)])
    roots = ("--models", str(models), "--data", str(data))
    with serving(tmp_path / "home", "--devices", "1", *roots) as served:
        sweep = served.submit(SPEC)
        with served.client() as client:
            wrong = client.post(
                "/v1/plan", content=SPEC.replace("team/gpt2", "team/gpt"), headers={"Content-Type": "application/yaml"}
            )
            (fault,) = wrong.json()["faults"]
            assert (wrong.status_code, fault["path"], fault["line"]) == (422, "task.model", 4)
            assert "did you mean 'team/gpt2'" in fault["hint"]

            status = served.wait_for(sweep, "finished", "failed", "paused")
            assert (status["state"], status["reason"]) == ("finished", "")
            answers = {
                path: client.get(f"/v1/sweeps/{sweep}{path}")
                for path in (
                    "",
                    "/events",
                    "/logs",
                    "/best",
                    "/report",
                    "/report?format=html",
                    "/export?format=hf_trainer",
                )
            }
            page = client.get(f"/sweeps/{sweep}", headers={"Accept": "text/html"})
        assert {answer.status_code for answer in answers.values()} == {200}
        assert "answers.jsonl" in answers["/events"].text
        assert not [path for path, answer in answers.items() if str(tmp_path / "roots") in answer.text]
        assert str(tmp_path / "roots") not in page.text + wrong.text
