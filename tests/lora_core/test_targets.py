"""The layers that we adapt are those that PEFT would, on the models that people fine-tune."""

from dataclasses import replace

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_core.adapter import LoraBank, Member
from lora_core.base import base_layer, layer_widths
from lora_core.checkpoint import export_peft_adapter
from lora_core.cost import layer_shapes, step_flops
from lora_core.init import initial_a, initial_b
from lora_core.packable import NotPackableError, check_packable, switch_off_dropout
from lora_core.targets import NoTargetError, find_targets, heads_of
from tests.lora_core.real_models import SHAPES, VOCABULARY, losses_of, make_model, make_point

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 by the older name, and warns of what a test adapts on purpose.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

TINY = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 1}
ENCODER = TINY | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DECODER = ENCODER | {"num_key_value_heads": 1}


def classifier(name: str) -> nn.Module:
    """Models for sequences: the head is a layer `score`, a layer `classifier`, or a module `classifier` of layers."""
    make = {
        "gpt2": lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, **TINY)
        ),
        "llama": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER)),
        "qwen2": lambda: transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**DECODER)),
        "qwen3": lambda: transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**DECODER)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER)),
        "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ENCODER)),
        "deberta-v2": lambda: transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(**ENCODER, pooler_hidden_size=16)
        ),
    }
    return make[name]()


CLASSIFIERS = ("gpt2", "llama", "qwen2", "qwen3", "bert", "roberta", "deberta-v2")


def theirs(model: nn.Module, **settings: object) -> set[str]:
    """What PEFT adapts."""
    return set(peft.get_peft_model(model, peft.LoraConfig(**settings)).targeted_module_names)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "t5-encoder"])
def test_all_linear_is_pefts_for_models_with_an_output_layer_and_without(name):
    task = {"task_type": "CAUSAL_LM" if SHAPES[name].causal else "SEQ_CLS"}
    found = find_targets(make_model(name), "All-Linear")
    assert set(found) == theirs(make_model(name), target_modules="all-linear", **task)
    assert not {"lm_head", "classifier"} & set(found)
    assert all(layer.kind == ("conv1d" if name == "gpt2" else "linear") for layer in found.values())


def test_all_linear_of_an_encoder_is_pefts():
    model, again = (
        transformers.T5EncoderModel(transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
        for _ in range(2)
    )
    assert set(find_targets(model, "all-linear")) == theirs(again, target_modules="all-linear")


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("by", ["all-linear", "names"])
def test_a_classification_models_head_gets_no_adapter(name, by):
    whole = find_targets(classifier(name), "all-linear")
    # RoBERTa's `dense` is in its head too.
    target_modules = by if by == "all-linear" else sorted({layer.rpartition(".")[2] for layer in whole})
    found = find_targets(classifier(name), target_modules)
    assert set(found) == theirs(classifier(name), target_modules=target_modules, task_type="SEQ_CLS") == set(whole)
    assert not any("classifier" in target or "score" in target for target in found)
    assert heads_of(classifier(name)) == ("classifier", "score")
    assert set(find_targets(classifier(name), "all-linear", heads=())) > set(whole)


def test_the_head_that_the_caller_names_gets_no_adapter():
    model = make_model("llama")
    found = find_targets(model, ["q_proj", "v_proj"], heads=["layers.0.self_attn"])
    assert set(found) == theirs(
        make_model("llama"), target_modules=["q_proj", "v_proj"], modules_to_save=["layers.0.self_attn"]
    )
    assert set(found) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


def test_conv1d_is_known_by_its_shape_and_name():
    ours = base_layer(transformers.pytorch_utils.Conv1D(6, 4))
    assert ours is not None
    assert (ours.kind, ours.in_features, ours.out_features) == ("conv1d", 4, 6)
    assert base_layer(nn.Conv1d(6, 4, 1)) is None
    assert base_layer(nn.Embedding(9, 4, max_norm=1.0)) is None
    embedding = base_layer(nn.Embedding(9, 4))
    assert embedding is not None
    assert (embedding.kind, embedding.in_features, embedding.out_features) == ("embedding", 9, 4)


def test_a_layer_that_mamba_never_calls_is_refused_as_in_peft():
    def mamba() -> nn.Module:
        config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
        return transformers.MambaForCausalLM(config)

    with pytest.raises(ValueError, match="out_proj' is incompatible with Mamba"):
        theirs(mamba(), target_modules=["out_proj"])
    with pytest.raises(NoTargetError, match=r"out_proj' of a mamba model is not, its weight is read directly"):
        find_targets(mamba(), ["out_proj"])
    assert find_targets(mamba(), ["in_proj"])


def test_all_linear_is_exported_as_the_layers_that_it_stands_for(tmp_path):
    model = make_model("roberta")
    with LoraBank.attach(model, "all-linear", [Member(make_point(), 0)]) as bank:
        export_peft_adapter(
            tmp_path, bank.adapter(0), rank=4, alpha=8, target_modules="all-linear", use_rslora=False, task_type=None
        )
    loaded = peft.PeftModel.from_pretrained(make_model("roberta"), tmp_path)
    assert set(loaded.targeted_module_names) == set(find_targets(make_model("roberta"), "all-linear"))
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type is None


def test_what_a_model_costs_counts_conv1d_and_adapted_embeddings():
    gpt2 = make_model("gpt2")
    targets = find_targets(gpt2, ["c_attn"])
    widths = layer_widths(gpt2, targets)
    assert widths["transformer.h.0.attn.c_attn"] == (32, 96)
    assert widths["lm_head"] == (32, VOCABULARY)
    assert "transformer.wte" not in widths
    llama = make_model("llama")
    targets = find_targets(llama, ["embed_tokens", "q_proj"])
    widths = layer_widths(llama, targets)
    assert next(iter(widths.items())) == ("model.embed_tokens", (VOCABULARY, 32))
    lookups = [name for name, layer in targets.items() if layer.kind == "embedding"]
    first, second, *_ = layer_shapes(widths, targets.keys(), lookups)
    assert (first.lookup, second.lookup, second.input_trained) == (True, False, True)
    flops = step_flops((first,), members=3, rank=4, rows=7)
    assert (flops.base, flops.adapters) == (0, 2 * 3 * 7 * 4 * 3 * 32)


def test_a_classifiers_adapter_loads_in_peft_as_one(tmp_path):
    model = make_model("roberta", torch.float64)
    with LoraBank.attach(model, ["query", "dense"], [Member(make_point(), 0)]) as bank:
        draws = torch.Generator().manual_seed(0)
        bank.params_KP.copy_(0.1 * torch.randn(bank.params_KP.shape, generator=draws))
        model.classifier.out_proj.weight.mul_(-1)  # as if its head had been trained
        ours = losses_of(model, 1, causal=False)(0)
        export_peft_adapter(
            tmp_path,
            bank.adapter(0),
            rank=4,
            alpha=8,
            target_modules=["query", "dense"],
            use_rslora=False,
            task_type="SEQ_CLS",
            saved_modules={"classifier": model.classifier.state_dict()},
        )
    loaded = peft.PeftModel.from_pretrained(
        make_model("roberta", torch.float64), tmp_path, autocast_adapter_dtype=False
    ).eval()
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    torch.testing.assert_close(losses_of(loaded, 1, causal=False)(0), ours, rtol=1e-12, atol=0)
    without = losses_of(model, 1, causal=False)(0)
    assert float((ours - without).detach().abs()) > 0.01, "the adapter must matter"


# -- seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_a_members_seed_reaches_the_init_of_every_layer_and_the_global_one_does_not(init):
    targets = ["q_proj", "down_proj", "embed_tokens"]

    def start(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        with LoraBank.attach(make_model("llama"), targets, [Member(make_point(), seed)], init=init) as bank:
            return {key: value for key, value in bank.adapter(0).items() if value.any()}

    one, same, other = start(1, 0), start(1, 5), start(2, 0)
    assert len(one) == 5
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)
    values = list(one.values())
    assert not torch.equal(values[0], values[1]), "layers of one shape draw apart"


def test_an_embeddings_draw_is_the_same_everywhere_and_for_ever():
    b_RO = initial_b(Member(make_point(1), 0), "wte", 4, torch.float32)
    a_RI = initial_a("gaussian", Member(make_point(1), 0), "fc1", 4, torch.float32)
    torch.testing.assert_close(b_RO, torch.tensor([[0.555170, -1.733425, -0.544257, 0.338337]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(a_RI, torch.tensor([[-0.473290, 0.431495, -0.085746, -1.985424]]), rtol=1e-5, atol=0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def attach(model: nn.Module, targets: list[str], members: int = 2, **more: object) -> None:
    LoraBank.attach(model, targets, [Member(make_point(**more), seed) for seed in range(members)])  # type: ignore[arg-type]


def test_tied_weights_are_refused_by_name():
    tied = "must have a weight of its own; found that 'lm_head' shares it with 'transformer.wte'.*untied"
    with pytest.raises(ValueError, match=tied):
        attach(make_model("gpt2"), ["lm_head"], members=1)
    with pytest.raises(ValueError, match=r"'transformer\.wte' shares it with 'lm_head'"):
        attach(make_model("gpt2"), ["wte"], members=1)
    attach(make_model("llama"), ["lm_head", "embed_tokens"])  # untied


def test_a_layer_that_two_parents_have_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
    with pytest.raises(ValueError, match=r"found that 'one\.0' shares it with 'two\.0'"):
        LoraBank.attach(model, ["0"], [Member(make_point(2), 0)])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query_proj"], r"the target 'deberta.*query_proj', which projects relative positions that all rows share"),
        (["key_proj", "value_proj"], r"key_proj', which projects relative positions"),
    ],
)
def test_debertas_shared_position_projections_are_not_packed(targets, message):
    model = make_model("deberta-v2")
    with pytest.raises(NotPackableError, match=f"{message}.*: train its members one at a time"):
        attach(model, targets)
    assert "BankedLinear" not in repr(model), "a refused pack must leave the model alone"
    attach(model, targets, members=1)


def test_an_embedding_of_positions_is_not_packed():
    with pytest.raises(NotPackableError, match=r"'transformer\.wpe', an embedding of something else than the input"):
        attach(make_model("gpt2"), ["wpe"])


def test_an_embedding_is_refused_under_two_learning_rates_and_under_dora():
    point = make_point()
    plus = replace(point, b=replace(point.b, lr=16 * point.b.lr))
    with pytest.raises(ValueError, match=r"carries the init scale in B.*found two learning rates and the target"):
        LoraBank.attach(make_model("llama"), ["embed_tokens"], [Member(plus, 0)])
    with pytest.raises(ValueError, match=r"DoRA is for linear layers here; found the embedding 'model\.embed_tokens'"):
        attach(make_model("llama"), ["embed_tokens"], dora=True)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)


def test_what_couples_rows_is_refused_with_all_reasons():
    model = Normed()
    with pytest.raises(NotPackableError, match=r"'norm', a BatchNorm1d that takes.*; 'drop', dropout of the model"):
        check_packable(model)
    attach(model, ["fc"], members=1, rank=2)
    check_packable(Normed().eval())
    attach(Normed().eval(), ["fc"], rank=2)


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_in_training_mode_is_packed_once_its_own_dropout_is_off(name):
    model = make_model(name).train()
    for module in model.modules():  # those that the configs leave at 0 too
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(NotPackableError, match="dropout of the model itself that is drawn by place in the batch"):
        check_packable(model)
    switch_off_dropout(model)
    check_packable(model)
    causal = SHAPES[name].causal
    assert torch.equal(losses_of(model, 1, causal=causal)(0), losses_of(make_model(name), 1, causal=causal)(0))


def test_experts_are_not_packed_with_a_balance_loss_nor_as_targets():
    config = transformers.MixtralConfig(**DECODER, num_local_experts=2, output_router_logits=True)
    with pytest.raises(NotPackableError, match="output_router_logits, a balance loss over the experts' loads"):
        check_packable(transformers.MixtralForCausalLM(config))
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(NotPackableError, match=r"'experts\.0', an expert that gets rows gathered"):
        check_packable(model, find_targets(model, ["0"]).keys())


def test_the_models_of_the_parity_suite_can_be_packed():
    for name, shape in SHAPES.items():
        model = make_model(name)
        check_packable(model, find_targets(model, shape.pack_targets).keys())
    assert VOCABULARY < 100
