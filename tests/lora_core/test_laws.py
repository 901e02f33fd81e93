import inspect

import pytest
import torch

from lora_core.laws import LAWS, WITHOUT_LAW, NoLawError, law_of

rows = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)

# What no trainer sets, and what this project sets for itself.
MACHINERY = {"self", "params", "lr", "weight_decay", "foreach", "fused", "maximize", "capturable", "differentiable"}


@rows
def test_a_row_names_every_setting_of_its_torch_class_with_its_default(law):
    parameters = inspect.signature(getattr(torch.optim, law.kind).__init__).parameters
    known = law.absolute.keys() | law.options.keys() | law.fixed.keys()
    # Adam's flag of decoupled decay is AdamW here, and NAdam's is nadamw.
    assert parameters.keys() - MACHINERY - {"decoupled_weight_decay"} == known - {"decoupled_weight_decay"}
    for name, row in (law.absolute | law.options).items():
        if name != "adjust_lr_fn":  # None in torch, which means the word
            assert parameters[name].default == row.default
    assert ("weight_decay" in parameters) == (law.decay is not None)
    assert "fused" in parameters or not law.fused


@rows
def test_a_row_takes_its_own_defaults(law):
    assert law.settings() == {name: option.default for name, option in law.options.items()}
    for constant in law.absolute.values():
        assert constant.accepts(constant.default)


def test_every_optimizer_of_torch_is_in_the_table_or_refused_by_name():
    kinds = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    refused = {name for name in kinds if name.lower() in WITHOUT_LAW}
    assert {law.kind for law in LAWS.values()} | refused == kinds
    assert len(refused) == len(WITHOUT_LAW)


@pytest.mark.parametrize("optimizer", WITHOUT_LAW)
def test_an_optimizer_without_a_law_is_refused_with_its_reason(optimizer):
    with pytest.raises(NoLawError, match=f"{optimizer} has no alpha equivalence: it.*use one of sgd, adam, adamw"):
        law_of(optimizer)


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(NoLawError, match="no law is known for the optimizer 'adamx'; use one of sgd, adam, adamw"):
        law_of("adamx")


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("adamw", {"momentum": 0.9}, r"adamw has the options betas, amsgrad; found momentum=0\.9"),
        ("adamw", {"betas": (0.9, 1.0)}, r"betas of adamw must be two numbers from 0 to below 1; found \(0\.9, 1\.0\)"),
        ("sgd", {"nesterov": True}, r"nesterov takes a momentum above 0 and no dampening; found momentum=0\.0"),
        ("sgd", {"nesterov": 1}, "nesterov of sgd must be true or false; found 1"),
        ("sgd", {"momentum": True}, "momentum of sgd must be a number from 0 to below 1; found True"),
        ("rprop", {"etas": (1.2, 0.5)}, r"etas of rprop must be two numbers, one below 1 and one above; found"),
        ("muon", {"ns_steps": 100}, "ns_steps of muon must be a whole number from 1 to 99; found 100"),
        ("muon", {"adjust_lr_fn": "sqrt"}, "adjust_lr_fn of muon must be original or match_rms_adamw; found 'sqrt'"),
    ],
)
def test_options_that_torch_would_refuse_are_refused_by_name(optimizer, options, message):
    with pytest.raises(ValueError, match=message):
        law_of(optimizer).settings(options)


def test_constants_are_the_given_ones_or_the_defaults():
    assert law_of("adagrad").constants({"eps": 1e-4, "lambd": 3.0}) == {"eps": 1e-4, "initial_accumulator_value": 0.0}
    assert law_of("rprop").constants() == {"step_sizes": (1e-6, 50.0)}
    assert law_of("sgd").constants({"eps": 1e-4}) == {}


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("sgd", "lr / k, init_scale / sqrt(k), weight_decay x k, clip_norm x sqrt(k)"),
        ("adam", "lr / sqrt(k), init_scale / sqrt(k), eps x sqrt(k), weight_decay x k, clip_norm x sqrt(k)"),
        ("adamw", "lr / sqrt(k), init_scale / sqrt(k), eps x sqrt(k), weight_decay x sqrt(k), clip_norm x sqrt(k)"),
        ("rprop", "lr / sqrt(k), init_scale / sqrt(k), step_sizes / sqrt(k), clip_norm x sqrt(k)"),
    ],
)
def test_a_law_describes_itself(optimizer, said):
    assert law_of(optimizer).describe() == f"{optimizer}: the same training run at alpha x k has {said}"
