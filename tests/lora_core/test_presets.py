import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from lora_core.gauge import Gauge, Point, regauge
from lora_core.laws import LAWS
from lora_core.presets import PRESETS, Preset, PresetError, preset
from tests.lora_core.support import make_point
from tests.support import ROOT


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "scaling"),
    [
        ("gpt2-nlg", 4, 128, 32),
        ("gpt2-nlg-readme", 4, 32, 8),
        ("roberta-base-nlu", 8, 16, 2),
        ("deberta-xxl-nlu", 16, 32, 2),
    ],
)
def test_a_preset_has_the_published_rank_alpha_and_scaling(name: str, rank: int, alpha: int, scaling: int):
    found = preset(name)
    assert (found.name, found.rank, found.alpha, found.scaling) == (name, rank, alpha, scaling)


def test_the_gpt2_preset_is_the_readme_command_but_for_alpha():
    found = preset("gpt2-nlg")
    assert (found.lr, found.weight_decay, found.betas, found.eps) == (2e-4, 0.01, (0.9, 0.999), 1e-6)
    assert (found.schedule, found.warmup_steps, found.warmup_ratio) == ("linear", 500, None)
    assert (found.dropout, found.clip_norm, found.epochs, found.batch_size) == (0.1, None, 5, 8)
    assert any("--lora_alpha 32" in remark for remark in found.remarks)
    assert replace(found, name="gpt2-nlg-readme", alpha=32.0, remarks=found.remarks[1:]) == preset("gpt2-nlg-readme")


def test_the_nlu_presets_are_their_mnli_scripts():
    roberta, deberta = preset("roberta-base-nlu"), preset("deberta-xxl-nlu")
    assert (roberta.lr, roberta.weight_decay, roberta.warmup_ratio, roberta.epochs) == (5e-4, 0.1, 0.06, 30)
    assert (deberta.lr, deberta.weight_decay, deberta.warmup_steps, deberta.epochs) == (1e-4, 0.0, 1000, 5)
    assert (roberta.batch_size, deberta.batch_size) == (128, 64)
    for found in (roberta, deberta):
        assert (found.eps, found.betas, found.clip_norm, found.dropout) == (1e-8, (0.9, 0.999), 1.0, 0.0)
        assert "classifier" in found.also_trained


def test_every_preset_names_its_sources_and_an_optimizer_with_a_law():
    for name, found in PRESETS.items():
        assert found.name == name
        assert found.source
        assert all(path.startswith("examples/") for path in found.source)
        assert found.optimizer in LAWS
        assert (found.warmup_steps is None) != (found.warmup_ratio is None)


def test_a_preset_cannot_be_changed():
    with pytest.raises(FrozenInstanceError, match="alpha"):
        preset("gpt2-nlg").alpha = 32.0


def test_the_default_of_gpt2_config_is_refused_because_it_has_no_adapter():
    with pytest.raises(PresetError, match=r"rank 1 or more; found gpt2-config-default.*lora_attn_dim=0") as caught:
        preset("gpt2-config-default")
    assert "128 / 0" in str(caught.value)
    assert "use gpt2-nlg" in str(caught.value)
    assert "gpt2-config-default" not in PRESETS


def test_an_unknown_name_lists_the_valid_ones_and_the_nearest():
    with pytest.raises(PresetError, match=r"found 'roberta-nlu' \(did you mean roberta-base-nlu\?\)") as caught:
        preset("roberta-nlu")
    assert all(name in str(caught.value) for name in PRESETS)
    with pytest.raises(PresetError, match="found 'x'") as caught:
        preset("x")
    assert "did you mean" not in str(caught.value)


def test_errors_and_presets_pickle():
    with pytest.raises(PresetError, match="found 'x'") as caught:
        preset("x")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert pickle.loads(pickle.dumps(preset("gpt2-nlg"))) == preset("gpt2-nlg")


def test_presets_load_without_torch():
    probe = "import lora_core.presets\nimport sys\nprint([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_field_of_a_preset_is_described():
    assert Preset.__doc__ is not None
    assert all(f"        {field.name}: " in Preset.__doc__ for field in fields(Preset))


# -- the source's own AdamW --------------------------------------------------------------------------------------------


def published_adamw(point: Point, betas: tuple[float, float], steps: int) -> list[float]:
    """Losses of a 1 x 1 layer with B A near 3, trained by the AdamW of the presets' docstring, on Python floats."""
    weights, moments = [0.7 * point.init_scale, 0.0], [[0.0, 0.0], [0.0, 0.0]]
    losses = []
    for t in range(1, steps + 1):
        a, b = weights
        error = point.scaling * b * a - 3.0
        losses.append(error * error)
        gradients = (2 * error * point.scaling * b, 2 * error * point.scaling * a)
        correction = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        for i, (gradient, settings) in enumerate(zip(gradients, (point.a, point.b), strict=True)):
            m, v = moments[i]
            m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * (gradient * gradient)
            moments[i] = [m, v]
            weights[i] -= settings.lr * correction * (m / (math.sqrt(v) + settings.eps))
            weights[i] -= settings.lr * settings.weight_decay * weights[i]
    return losses


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("k", [0.25, 4, 64])
def test_the_law_holds_for_the_adamw_of_the_source_bit_for_bit(name: str, k: float):
    found = preset(name)
    constants = {"lr": found.lr, "eps": found.eps, "weight_decay": found.weight_decay}
    point = make_point(rank=found.rank, scaling=found.scaling, **constants)
    twin = regauge(point, Gauge.of_alpha(k), LAWS[found.optimizer])
    losses = published_adamw(point, found.betas, steps=200)
    assert published_adamw(twin, found.betas, steps=200) == losses
    assert losses[-1] < losses[0]
