"""What a model must be for adapters to be trained over it, alone or as a pack: checked before anything is changed.

A pack repeats the batch, member-major, and deals each layer's rows to its members. That is right where every adapted
layer is called with all rows in that order, and where no row has a say in another's result. What breaks it and can be
seen is refused here, with the reason. What cannot be seen, and is the caller's to know:

- a layer that is called with rows gathered or sorted across the batch, unless it is below a module called `experts`;
- a loss, or a normalisation, that a model's own code takes over the whole batch;
- noise whose probability is not a dropout layer's, nor a number called `...drop...` in the module that draws it.

The model's own dropout is off in evaluation mode. Some need training mode (transformers checkpoints gradients in it
only); `switch_off_dropout` is for those.

Adapters of one rank and scaling a member, on all its layers: PEFT's `rank_pattern` and `alpha_pattern` have no place
in a bank, and `checkpoint.import_peft_adapter` refuses an adapter that has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lora_core.base import BaseLayer
from lora_core.dora import check_rows
from lora_core.init import Member

_POSITION_LAYERS = {"pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj"}
_SHARED_POSITION_LAYERS = {"query_proj", "key_proj"}


class RankError(ValueError):
    """A rank that a layer has no room for."""


class NotPackableError(ValueError):
    """A model of which several members cannot be trained at once; the message has every reason."""


def check_packable(model: nn.Module, targets: Collection[str] = ()) -> None:
    """Checks that several members can be trained over a model at once, in the mode that it is in.

    Args:
        model: any module.
        targets: full names of the layers that would be adapted.

    Raises:
        NotPackableError: it couples rows, or calls a target with rows that belong to no member.
    """
    if reasons := [*_couplings(model), *_undealt(model, targets)]:
        raise NotPackableError(
            f"a pack needs a model that keeps the rows of its members apart; found {'; '.join(reasons)}: train its "
            "members one at a time"
        )


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of a model to 0, for good: of its dropout layers and of its own function calls.

    So that it can be in training mode, and yet a member's run does not depend on its place in a pack.
    """
    for module in model.modules():
        for attribute in _drops(module):
            setattr(module, attribute, 0.0)


def check_members(members: Sequence[Member], bases: Mapping[str, BaseLayer]) -> None:
    """Checks the members of a pack against each other and against the layers that they adapt.

    Raises:
        RankError: a member's rank exceeds a layer's width.
        ValueError: no members, some with DoRA or a head and some without, a row of zeros under DoRA, or an embedding
            under what has no meaning for it.
    """
    if not members:
        raise ValueError("a pack needs at least one member; found none")
    for rank in {member.point.rank for member in members}:
        for name, base in bases.items():
            width = min(base.in_features, base.out_features)
            if not 1 <= rank <= width:
                raise RankError(
                    f"layer {name!r} takes ranks from 1 to its width {width}; found rank {rank}: use a smaller rank or "
                    "leave the layer out of target_modules"
                )
    having = [k for k, member in enumerate(members) if member.point.magnitude is not None]
    if having and len(having) < len(members):
        lacking = [k for k in range(len(members)) if k not in having]
        raise ValueError(
            f"a pack's members must have DoRA all or none; found members {having} with it and {lacking} without: "
            "train them in a pack each"
        )
    if len({member.point.head is None for member in members}) > 1:
        raise ValueError("a pack's members must train a head all or none; found both: train them in a pack each")
    embeddings = [name for name, base in bases.items() if base.kind == "embedding"]
    if embeddings:
        _check_embeddings(members, embeddings)
    if having:
        check_rows({name: base.weight_OI for name, base in bases.items()})


def check_own_weights(model: nn.Module, bases: Mapping[str, BaseLayer]) -> None:
    """Checks that the weight of each target layer is its own, and that the layer has one name.

    Raises:
        ValueError: tied weights, which a merged adapter would change in both places, or a layer that the model reaches
            by two names, of which only one would get the adapter.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, base in bases.items():
        if others := [other for other in owners[id(base.weight)] if other != name]:
            raise ValueError(
                f"a target layer must have a weight of its own; found that {name!r} shares it with {others[0]!r}, "
                "so that merging would change both: leave it out of target_modules, or load the model with untied "
                "weights (tie_word_embeddings=False)"
            )


def _check_embeddings(members: Sequence[Member], names: Sequence[str]) -> None:
    if any(member.point.a != member.point.b for member in members):
        raise ValueError(
            f"an adapter on an embedding starts with A = 0 and carries the init scale in B, so its gauge needs the "
            f"same constants for A and B; found two learning rates and the target {names[0]!r}: use one learning rate, "
            "or leave it out of target_modules"
        )
    if any(member.point.magnitude is not None for member in members):
        raise ValueError(
            f"DoRA is for linear layers here; found the embedding {names[0]!r}: leave it out of target_modules, or "
            "train without DoRA"
        )


def _couplings(model: nn.Module) -> Iterator[str]:
    """What makes a row's result depend on other rows, or on its place among them."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            yield f"{name!r}, a {type(module).__name__} that takes its statistics over the batch"
            break
    for name, module in model.named_modules():
        if module.training and _drops(module):
            yield f"{name!r}, dropout of the model itself that is drawn by place in the batch (switch_off_dropout)"
            break
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        yield "output_router_logits, a balance loss over the experts' loads of the whole batch"
    if getattr(config, "expert_capacity", None):
        yield "expert_capacity, experts that drop tokens by what else is in the batch"
    if model.training and getattr(config, "router_jitter_noise", None):
        yield "router_jitter_noise, noise that is drawn by place in the batch"


def _drops(module: nn.Module) -> list[str]:
    """Attributes of a module that are probabilities of dropout above 0."""
    if isinstance(module, _DropoutNd):
        return ["p"] if module.p > 0 else []
    return [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float) and value > 0]


def _undealt(model: nn.Module, targets: Collection[str]) -> Iterator[str]:
    """Target layers that are called with rows of which no member is the owner."""
    find_input = getattr(model, "get_input_embeddings", None)
    words = find_input() if callable(find_input) else None
    for name in targets:
        path, module = name.split("."), model.get_submodule(name)
        if isinstance(module, nn.Embedding) and module is not words:
            # They may be looked up once for the whole batch, by positions [1, T] or [T, T].
            yield f"the target {name!r}, an embedding of something else than the input"
        elif "experts" in path[:-1]:
            yield f"the target {name!r}, an expert that gets rows gathered from the whole batch"
        elif path[-1] in _position_layers(model.get_submodule(".".join(path[:-1]))):
            yield f"the target {name!r}, which projects relative positions that all rows share"


def _position_layers(attention: nn.Module) -> set[str]:
    """DeBERTa: the layers that project the table of relative positions [1, positions, I], once for all rows."""
    if "Disentangled" not in type(attention).__name__ or not getattr(attention, "relative_attention", False):
        return set()
    return _POSITION_LAYERS | (_SHARED_POSITION_LAYERS if getattr(attention, "share_att_key", False) else set())
