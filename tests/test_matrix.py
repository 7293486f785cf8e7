"""What holds for every method on every kind of layer that it adapts.

The methods, and the layers that each adapts, are read from the registry: a new method is tested here as soon as it is
registered. Prompt learning is not: it puts no adapter into layers but a prompt before the inputs of a language model, so
there are no kinds of layers, no merging and no base weights to bring back. Its own tests have the same questions.
"""

import copy
import pickle

import matrix
import pytest
import torch
from matrix import (
    BASES,
    FIRST,
    FURTHER_BASES,
    SECOND,
    Case,
    adapter_parameters,
    changed,
    names_of,
    output,
    perturb,
    same,
    state,
    trainable,
    tuner_layers,
)
from torch.testing import assert_close
from versions import lacking

import peft
from peft.engine.layer import AdapterLayer, AdditiveLayer
from peft.utils.registry import all_methods

ADAPTED = matrix.cases(BASES)
ONE_OF_A_SORT = [case for case in ADAPTED if case.base.name not in ("conv1d", "conv3d", "conv2d-groups")]
"""For what does not depend on how a convolution applies its weight."""


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- the matrix itself


@pytest.mark.parametrize("name", sorted(peft_type.value for peft_type in all_methods()))
def test_every_method_that_adapts_layers_is_here(name):
    entry = all_methods()[name]
    if not matrix.is_tuner(entry) or name in matrix.NOT_BY_LAYERS:
        return
    case = next((case for case in ADAPTED if case.variant.name == name), None)
    assert case is not None, (
        f"{entry.model_cls.__name__} says by its layer_classes that it adapts none of {list(map(str, BASES))}. Declare "
        "the kinds of layers ('any' for every module); or say why it adapts no layer by itself in "
        "matrix.NOT_BY_LAYERS."
    )
    try:
        case.fresh()
    except Exception as error:
        raise AssertionError(
            f"{entry.config_cls.__name__} with {case.variant.options or 'no options'} beside target_modules does not "
            f"build an adapter on {case.base}: {error!r}. Say in matrix.OPTIONS what it needs."
        ) from error


@pytest.mark.parametrize("limit", matrix.LIMITS, ids=str)
def test_every_limit_is_one_of_a_method(limit):
    every = [*ADAPTED, *matrix.cases(BASES, adapted=False), *matrix.cases(FURTHER_BASES)]
    assert [case for case in every if case.limit(limit.action) is limit]


# ------------------------------------------------------------------------------------------------------------ injection


@over(matrix.cases(BASES, adapted=False))
def test_other_layers_are_refused_and_nothing_has_changed(case):
    base = case.base.make()
    before, flags = state(base), trainable(base)
    limit = case.limit("adapt")
    error = case.variant.tuner.unsupported_error if limit is None else limit.error
    with pytest.raises(error, match="layer" if limit is None else limit.match):
        peft.get_peft_model(base, case.variant.config(FIRST))
    assert changed(before, state(base)) == set()
    assert trainable(base) == flags
    assert not tuner_layers(base)
    assert not hasattr(base, "peft_config")


@over(ADAPTED)
def test_the_declared_class_wraps_the_layer(case):
    model = case.fresh()
    layer = model.base_model.model.layer
    assert type(layer) is case.layer_class
    assert isinstance(layer, case.variant.tuner.tuner_layer_cls)
    assert type(layer.get_base_layer()) is type(case.base.make_layer())
    assert model.targeted_module_names == ["layer"]


@over(ADAPTED)
def test_exactly_the_tensors_of_the_adapter_train(case):
    model = case.fresh()
    assert trainable(model) == names_of(model, FIRST) != set()
    model(case.x).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} <= names_of(
        model, FIRST
    )


@over(ONE_OF_A_SORT)
def test_in_inference_mode_nothing_trains(case):
    model = case.fresh(config={"inference_mode": True})
    assert trainable(model) == set()
    perturb(model, FIRST)
    assert same(output(model, case.x), output(case.one(), case.x))


@over(ADAPTED)
def test_a_new_adapter_changes_nothing(case):
    case.skip_other_start()
    model = case.fresh(config=case.usual_start)
    found = output(model, case.x)
    layer = model.base_model.model.layer
    if isinstance(layer, AdditiveLayer):
        assert same(found, case.base_output)
    else:
        close(found, case.base_output, 1e-6)


@over(ADAPTED)
def test_an_adapter_that_was_trained_changes_the_output(case):
    found = output(case.one(), case.x)
    assert found.isfinite().all()
    assert found.shape == case.base_output.shape
    assert (found - case.base_output).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- forward


@over(ADAPTED)
def test_disabled_it_is_the_base_model(case):
    model = case.one()
    before, flags = output(model, case.x), trainable(model)
    with model.disable_adapter():
        found = model(case.x)
        assert same(found, case.base_output)
        assert not found.requires_grad
        assert trainable(model) == set()
    assert same(output(model, case.x), before)
    assert trainable(model) == flags


@over(ADAPTED)
def test_one_step_changes_only_the_active_adapter(case):
    model = case.two()
    before = state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(case.x).square().sum().backward()
    optimizer.step()
    assert changed(before, state(model)) == names_of(model, FIRST)


@over(ADAPTED)
def test_gradient_is_that_of_the_folded_weight(case):
    model = case.one()
    layer = model.base_model.model.layer
    if not isinstance(layer, AdapterLayer) or case.base.net is not matrix.Net:
        return  # a copy of a module is that module's own gradient
    with case.declared("merge") as possible:
        folded = layer.fold(layer.base_tensors(), FIRST)
    if not possible:
        return
    folded = {f"layer.{name}": value for name, value in folded.items()}
    leaves, x = dict(adapter_parameters(model, FIRST)), case.x
    if x.is_floating_point():
        leaves["input"] = x.requires_grad_()
    expected = torch.func.functional_call(case.base.make(), folded, (x,)).square().mean()
    expected = torch.autograd.grad(expected, list(leaves.values()))
    found = torch.autograd.grad(model(x).square().mean(), list(leaves.values()))
    for name, one, other in zip(leaves, found, expected):
        assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@over(ONE_OF_A_SORT)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(case, use_reentrant):
    x = case.x
    if use_reentrant and not x.is_floating_point():
        return  # needs an input that requires grad, which token ids cannot
    gradients = []
    for checkpointed in (False, True):
        model = case.one()
        leaf = x.clone().requires_grad_(x.is_floating_point())
        if checkpointed:
            result = torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=use_reentrant)
        else:
            result = model(leaf)
        result.square().sum().backward()
        gradients.append([parameter.grad for _, parameter in adapter_parameters(model, FIRST)] + [leaf.grad])
    for one, other in zip(*gradients):
        assert (one is None) == (other is None)
        if one is not None:  # not bit for bit: without gradients torch takes other kernels for some convolutions
            close(one, other)


@over(ADAPTED)
def test_an_empty_batch(case):
    model, x = case.one(), case.x[:0]
    expected = case.base.make()(x)
    found = model(x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found.sum().backward()
    for name, parameter in adapter_parameters(model, FIRST):
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@over(ADAPTED)
def test_a_single_row_without_batch(case):
    model, x = case.one(), case.x
    close(output(model, x[0]), output(model, x)[0])


class Noting:
    """A layer with an argument of its own; keeps what it was called with."""

    notes: list = []

    def forward(self, *args, note=None, **kwargs):
        self.notes.append(note)
        return super().forward(*args, **kwargs)


@over(ONE_OF_A_SORT)
@pytest.mark.parametrize("merged", [False, True])
def test_further_arguments_reach_the_base_layer(case, merged):
    base = case.base.make()
    cls = type(base.layer)
    base.layer.__class__ = type(cls.__name__, (Noting, cls), {"notes": []})
    model = case.called(peft.get_peft_model(base, case.variant.config(FIRST), adapter_name=FIRST))
    perturb(model, FIRST)
    close(output(model, case.x), output(case.one(), case.x))
    if merged:
        with case.declared("merge"):
            model.merge_adapter()
    for note in ("adapted", "disabled"):
        base.layer.get_base_layer().notes.clear()
        if note == "disabled":
            model.base_model.disable_adapter_layers()
        model(case.x, note=note)
        assert set(base.layer.get_base_layer().notes) == {note}
    with pytest.raises(TypeError, match="nonsense"):
        model(case.x, nonsense=1)


@over(ADAPTED)
def test_training_after_a_forward_in_inference_mode(case):
    model = case.one()
    with torch.inference_mode():
        expected = model(case.x).clone()
    found = model(case.x)
    close(found, expected)
    found.sum().backward()


@over(ONE_OF_A_SORT)
def test_under_the_transforms_of_torch_func(case):
    model = case.one()
    parameters = dict(adapter_parameters(model, FIRST))

    def loss(values):
        return torch.func.functional_call(model, values, (case.x,)).square().mean()

    found = torch.func.grad(loss)({name: parameter.detach() for name, parameter in parameters.items()})
    expected = torch.autograd.grad(model(case.x).square().mean(), list(parameters.values()))
    for one, other in zip(found.values(), expected):
        close(one, other)
    with torch.no_grad():
        close(torch.vmap(model)(case.x.unsqueeze(1)).squeeze(1), model(case.x))


@pytest.mark.compat
@over([case for case in ADAPTED if case.base.name == "linear"])
def test_compiled_whole(case):
    reason = lacking("torch", "2.7", "does not trace through the context in which Poly keeps a call's tasks")
    if case.variant.name == "POLY" and reason:
        pytest.skip(reason)
    model, plain = case.one(), case.one()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found, expected = compiled(case.x), plain(case.x)
    close(found, expected)
    gradients = [
        torch.autograd.grad(result.square().sum(), [parameter for _, parameter in adapter_parameters(owner, FIRST)])
        for result, owner in ((found, model), (expected, plain))
    ]
    for one, other in zip(*gradients):
        close(one, other)


# -------------------------------------------------------------------------------------------------------------- dtypes


@over(ONE_OF_A_SORT)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_on_a_bfloat16_base(case, autocast_adapter_dtype):
    x = case.base.input(torch.bfloat16)
    model = case.one(torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype)
    keeps = getattr(case.layer_class, "keeps_dtype", False)
    expected = torch.float32 if autocast_adapter_dtype and not keeps else torch.bfloat16
    assert {parameter.dtype for _, parameter in adapter_parameters(model, FIRST)} == {expected}
    found = model(x)
    assert found.dtype == torch.bfloat16
    close(found, output(case.one(), case.x), 0.1)
    found.sum().backward()
    for name, parameter in adapter_parameters(model, FIRST):
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    with case.declared("merge") as possible:
        model.merge_adapter(safe_merge=True)
    if possible:
        assert {parameter.dtype for parameter in case.base.make(torch.bfloat16).parameters()} == {torch.bfloat16}
        merged = output(model, x)
        assert merged.dtype == torch.bfloat16
        close(merged, found, 0.1)


@pytest.mark.compat
@over(ONE_OF_A_SORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(case, dtype):
    model, plain, x = case.one(dtype), case.base.make(dtype), case.base.input(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), plain(x)
    assert found.dtype == expected.dtype
    close(found, output(case.one(), case.x), 0.1)
    found.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for _, parameter in adapter_parameters(model, FIRST))


@over(ADAPTED)
def test_moved_to_another_dtype(case):
    model, x = case.one(), case.base.input(torch.float64)
    expected = output(model, case.x)
    model.double()
    found = output(model, x)
    assert found.dtype == torch.float64
    close(found, expected)
    with case.declared("merge") as possible:
        model.merge_adapter()
    if possible:
        close(output(model, x), expected)
        model.float()
        model.unmerge_adapter()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert changed(state(case.one()), state(model)) == set()


@over(ONE_OF_A_SORT)
def test_on_a_float64_base(case):
    model = case.one(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model(case.base.input(torch.float64)).sum().backward()


# ------------------------------------------------------------------------------------------------------------- merging


def merged_equals_forward(case: Case) -> None:
    model = case.one()
    before, expected = state(model), output(model, case.x)
    with case.declared("merge") as possible:
        model.merge_adapter()
    if not possible:
        assert changed(before, state(model)) == set()
        assert same(output(model, case.x), expected)
        assert not any(layer.merged for layer in tuner_layers(model))
        return
    touched = changed(before, state(model))
    assert touched and all("base_layer" in name for name in touched)
    close(output(model, case.x), expected)
    model.unmerge_adapter()
    assert changed(before, state(model)) == set()
    assert same(output(model, case.x), expected)
    for parameter in model.base_model.model.layer.get_base_layer().parameters():
        parameter.data.mul_(2)
    before = state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert changed(before, state(model)) == set()


@over(ADAPTED)
def test_merged_equals_forward_and_unmerging_is_exact(case):
    merged_equals_forward(case)


@over(matrix.cases(FURTHER_BASES))
def test_merged_equals_forward_with_options_of_the_layer(case):
    merged_equals_forward(case)


@over(ADAPTED)
def test_safe_merge_gives_the_same(case):
    results = []
    for safe_merge in (False, True):
        model = case.one()
        with case.declared("merge"):
            model.merge_adapter(safe_merge=safe_merge)
        results.append(state(model))
    assert changed(*results) == set()


@over(ADAPTED)
def test_safe_merge_refuses_what_is_not_finite(case):
    if case.limit("merge"):
        return
    model = case.one()
    for _, parameter in adapter_parameters(model, FIRST):
        parameter.data.fill_(torch.nan)
    before = state(model)
    with pytest.raises(ValueError, match="layer.*NaN|NaN.*layer"):
        model.merge_adapter(safe_merge=True)
    after = state(model)
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)
    assert not any(layer.merged for layer in tuner_layers(model))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert tuner_layers(model)


@over(ADAPTED)
def test_merge_and_unload(case):
    model, plain = case.one(), case.base.make()
    expected = output(model, case.x)
    with case.declared("merge") as possible:
        unloaded = model.merge_and_unload()
    if not possible:
        assert same(output(model, case.x), expected)
        return
    assert not tuner_layers(unloaded)
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert changed(state(plain), state(unloaded)) <= {f"layer.{name}" for name, _ in plain.layer.named_parameters()}
    assert not hasattr(unloaded, "peft_config")
    close(output(unloaded, case.x), expected)


@over(ADAPTED)
@pytest.mark.parametrize("merged", [False, True])
def test_unload(case, merged):
    model, plain = case.one(), case.base.make()
    if merged:
        with case.declared("merge"):
            model.merge_adapter()
    unloaded = model.unload()
    assert not tuner_layers(unloaded)
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert changed(state(plain), state(unloaded)) == set()
    assert same(output(unloaded, case.x), case.base_output)


@over(ONE_OF_A_SORT)
def test_merging_an_unknown_adapter_is_refused(case):
    model = case.one()
    before, expected = state(model), output(model, case.x)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"'frist'.*{FIRST}"):
            call(adapter_names=["frist"])
    assert changed(before, state(model)) == set()
    assert same(output(model, case.x), expected)


@over(ADAPTED)
def test_merged_adapters_are_disabled_and_enabled(case):
    model = case.one()
    with case.declared("merge") as possible:
        model.merge_adapter()
    if not possible:
        return
    merged, before = output(model, case.x), state(model)
    with model.disable_adapter():
        assert same(output(model, case.x), case.base_output)
    assert same(output(model, case.x), merged)
    assert changed(before, state(model)) == set()


@over(ADAPTED)
def test_scales(case):
    model = case.two()
    layer = model.base_model.model.layer
    before = output(model, case.x)
    if not isinstance(layer, AdditiveLayer):
        layer.set_scale(FIRST, 2.0)
        layer.scale_layer(2.0)
        layer.unscale_layer()
        assert same(output(model, case.x), before)
        return
    with case.declared("merge") as possible:
        delta = layer.get_delta_weight(FIRST)
    inactive, initial = layer.scaling[SECOND], layer.scaling[FIRST]
    assert initial == layer.initial_scaling(FIRST)
    layers = [module for module in tuner_layers(model) if isinstance(module, AdditiveLayer)]

    def everywhere(call, *args):
        for module in layers:
            getattr(module, call)(*args)

    for call, args, factor in (
        ("set_scale", (FIRST, 2.0), 2.0),
        ("scale_layer", (3.0,), 6.0),
        ("unscale_layer", (2.0,), 3.0),
        ("scale_layer", (1,), 3.0),
        ("set_scale", ("no such adapter", 5.0), 3.0),
        ("set_scale", (FIRST, 0.5), 0.5),
    ):
        everywhere(call, *args)
        assert layer.scaling[FIRST] == pytest.approx(factor * initial)
        assert layer.scaling[SECOND] == inactive
        assert not same(output(model, case.x), before)
        if possible:
            close(layer.get_delta_weight(FIRST), factor * delta)
    expected = output(model, case.x)
    if possible:
        model.merge_adapter()
        close(output(model, case.x), expected)
        model.unmerge_adapter()
    everywhere("unscale_layer")
    assert layer.scaling[FIRST] == initial
    assert same(output(model, case.x), before)


# ----------------------------------------------------------------------------------------------------------- two adapters


@over(ADAPTED)
def test_switching_between_two_adapters(case):
    model = case.one()
    first = output(model, case.x)
    model.add_adapter(SECOND, case.variant.config(SECOND))
    perturb(model, SECOND)
    assert trainable(model) == names_of(model, FIRST)
    assert same(output(model, case.x), first)
    model.set_adapter(SECOND)
    second = output(model, case.x)
    assert trainable(model) == names_of(model, SECOND)
    assert (first - second).abs().max() > 1e-3
    model.set_adapter(FIRST)
    assert same(output(model, case.x), first)
    status = model.get_model_status()
    assert status.available_adapters == [FIRST, SECOND]
    assert status.active_adapters == [FIRST]
    assert status.requires_grad == {FIRST: True, SECOND: False}


@over(ADAPTED)
def test_two_adapters_at_once(case):
    model = case.two()
    alone = output(model, case.x)
    with case.declared("both at once") as possible:
        model.base_model.set_adapter([FIRST, SECOND])
    if not possible:
        assert model.active_adapters == [FIRST]
        assert trainable(model) == names_of(model, FIRST)
        assert same(output(model, case.x), alone)
        return
    assert trainable(model) == names_of(model, FIRST, SECOND)
    both = output(model, case.x)
    assert not same(both, alone)
    with case.declared("merge") as possible:
        model.merge_adapter()
    if not possible:
        return
    close(output(model, case.x), both)
    model.unmerge_adapter()
    assert same(output(model, case.x), both)
    before = state(model)
    model.merge_adapter(adapter_names=[FIRST])
    with pytest.warns(UserWarning, match=SECOND):
        model.merge_adapter(adapter_names=[SECOND])
    close(output(model, case.x), both)
    model.unmerge_adapter()
    assert changed(before, state(model)) == set()


@over(ADAPTED)
def test_an_adapter_added_beside_a_merged_one_starts_from_the_base(case):
    case.skip_other_start()
    model = case.one()
    with case.declared("merge") as possible:
        model.merge_adapter()
    if not possible:
        return
    merged = output(model, case.x)
    model.add_adapter(SECOND, case.variant.config(SECOND, **case.usual_start))
    if not case.layer_class.exclusive:  # a new copy of a module is made of the module as it is
        assert same(output(model, case.x), merged)
    model.set_adapter(SECOND)
    assert not any(layer.merged for layer in tuner_layers(model))
    close(output(model, case.x), case.base_output)


@over(ONE_OF_A_SORT)
def test_an_adapter_added_while_disabled_waits(case):
    model = case.one()
    model.base_model.disable_adapter_layers()
    model.add_adapter(SECOND, case.variant.config(SECOND))
    perturb(model, SECOND)
    assert trainable(model) == set()
    model.set_adapter(SECOND)
    assert trainable(model) == set()
    assert same(output(model, case.x), case.base_output)
    model.base_model.enable_adapter_layers()
    assert trainable(model) == names_of(model, SECOND)
    assert not same(output(model, case.x), case.base_output)


@over(ONE_OF_A_SORT)
def test_deleting_falls_back(case):
    model = case.two()
    model.set_adapter(SECOND)
    second = output(model, case.x)
    model.set_adapter(FIRST)
    model.delete_adapter(FIRST)
    assert model.active_adapters == [SECOND]
    assert not [name for name in model.state_dict() if FIRST in name.split(".")]
    assert trainable(model) == names_of(model, SECOND)
    assert same(output(model, case.x), second)
    model.delete_adapter(SECOND)
    assert model.active_adapters == []
    assert trainable(model) == names_of(model, SECOND) == set()
    assert same(output(model, case.x), case.base_output)


@over(ONE_OF_A_SORT)
def test_a_deleted_adapter_starts_over(case):
    case.skip_other_start()
    model = case.two()
    model.delete_adapter(FIRST)
    model.add_adapter(FIRST, case.variant.config(FIRST, **case.usual_start))
    model.set_adapter(FIRST)
    close(output(model, case.x), case.base_output)


@over(ADAPTED)
def test_a_mixed_batch_is_its_rows(case):
    model, x = case.two(), case.x
    rows = [SECOND, FIRST, "__base__", SECOND]
    with case.declared("mixed batch") as possible:
        found = output(model, x, adapter_names=rows)
    if not possible:
        return
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                expected = output(model, x)
        else:
            model.set_adapter(name)
            expected = output(model, x)
        close(found[row], expected[row])
    model.set_adapter(FIRST)
    close(output(model, x, adapter_names=[FIRST] * 4), output(model, x))
    assert same(output(model, x, adapter_names=["__base__"] * 4), case.base_output)
    with model.disable_adapter():
        assert same(output(model, x, adapter_names=rows), case.base_output)


@over(ONE_OF_A_SORT)
def test_a_mixed_batch_that_does_not_fit_is_refused(case):
    if case.limit("mixed batch"):
        return
    model = case.two()
    for rows, problem in (([FIRST] * 3, "3"), ([FIRST] * 5, "5"), (["frist"] * 4, "frist")):
        with pytest.raises(ValueError, match=problem):
            model(case.x, adapter_names=rows)
    with pytest.raises(ValueError, match="eval"):
        model.train()(case.x, adapter_names=[FIRST] * 4)
    model.eval()
    with case.declared("merge") as possible:
        model.merge_adapter()
    if possible:
        with pytest.raises(ValueError, match="merged"):
            model(case.x, adapter_names=["__base__"] * 4)


# ---------------------------------------------------------------------------------------------------- copies and files


def assert_equal_models(found, model, x):
    assert changed(state(model), state(found)) == set()
    assert same(output(found, x), output(model, x))


@over(ONE_OF_A_SORT)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(case, duplicate):
    model = case.two()
    model(case.x)
    copied = duplicate(model)
    assert_equal_models(copied, model, case.x)
    assert trainable(copied) == trainable(model)
    before, expected = state(model), output(model, case.x)
    for adapter in (FIRST, SECOND):
        perturb(copied, adapter)
    copied.set_adapter(SECOND)
    assert changed(before, state(model)) == set()
    assert same(output(model, case.x), expected)
    assert trainable(model) == names_of(model, FIRST)
    with case.declared("merge") as possible:
        model.merge_adapter()
    if possible:
        copied = duplicate(model)
        copied.unmerge_adapter()
        assert changed(before, state(copied)) == set()
        assert changed(before, state(model)) != set()


@over(ONE_OF_A_SORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_state_dict_goes_into_another_model(case, low_cpu_mem_usage, dtype):
    model = case.one(dtype)
    saved = peft.get_peft_model_state_dict(model, adapter_name=FIRST)
    of_state = peft.get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name=FIRST)
    assert changed(saved, of_state) == set()
    other = peft.get_peft_model(
        case.base.make(dtype), case.variant.config(FIRST), adapter_name=SECOND, low_cpu_mem_usage=low_cpu_mem_usage
    )
    case.called(other)
    result = peft.set_peft_model_state_dict(other, saved, adapter_name=SECOND, low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.unexpected_keys == []
    assert not names_of(other, SECOND).intersection(result.missing_keys)
    assert not [name for name, tensor in other.state_dict().items() if tensor.is_meta]
    assert trainable(other) == names_of(other, SECOND)
    again = peft.get_peft_model_state_dict(other, adapter_name=SECOND)
    again = {key.replace(f".{SECOND}.", f".{FIRST}."): value for key, value in again.items()}
    expected, found = output(model, case.base.input(dtype)), output(other, case.base.input(dtype))
    if low_cpu_mem_usage and dtype != torch.float32:  # takes on the dtype of the base
        assert changed({key: value.to(dtype) for key, value in saved.items()}, again) == set()
        close(found, expected, 0.1)
    else:
        assert changed(saved, again) == set()
        assert same(found, expected)


@over(ONE_OF_A_SORT)
def test_saved_and_loaded(case, tmp_path):
    model = case.two()
    first = output(model, case.x)
    model.set_adapter(SECOND)
    second = output(model, case.x)
    model.set_adapter(FIRST)
    model.save_pretrained(tmp_path)
    loaded = case.called(peft.PeftModel.from_pretrained(case.base.make(), tmp_path / FIRST, adapter_name=FIRST))
    assert trainable(loaded) == set()
    assert same(output(loaded, case.x), first)
    result = loaded.load_adapter(tmp_path / SECOND, SECOND, is_trainable=True, low_cpu_mem_usage=True, strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.is_meta]
    loaded.set_adapter(SECOND)
    assert trainable(loaded) == names_of(loaded, SECOND)
    assert same(output(loaded, case.x), second)
    assert changed(state(model), state(loaded)) == set()


@over(ONE_OF_A_SORT)
@pytest.mark.parametrize("assign", [False, True])
def test_state_of_the_whole_model_is_loaded(case, assign):
    model, other = case.two(), case.two()
    for _, parameter in adapter_parameters(other, FIRST, SECOND):
        parameter.data.mul_(0.5)
    output(other, case.x)
    other.load_state_dict(state(model), assign=assign)
    assert_equal_models(other, model, case.x)


@over(ONE_OF_A_SORT)
def test_biases_are_trained_and_saved(case, tmp_path):
    if not case.variant.has("bias"):
        return
    model = case.fresh(config={"bias": "all"})
    biases = [name for name, _ in model.named_parameters() if name.endswith("base_layer.bias")]
    assert trainable(model) == names_of(model, FIRST).union(biases)
    perturb(model, FIRST)
    for name in biases:
        model.get_parameter(name).data.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = case.called(peft.PeftModel.from_pretrained(case.base.make(), tmp_path / FIRST))
    assert same(output(loaded, case.x), output(model, case.x))


@over(ONE_OF_A_SORT)
def test_a_module_trained_in_full_goes_with_the_adapter(case, tmp_path):
    if not case.variant.has("modules_to_save"):
        return
    model = case.fresh(config={"modules_to_save": ["act"]})
    copied = "base_model.model.act.modules_to_save.first.weight"
    assert trainable(model) == names_of(model, FIRST)
    assert copied in trainable(model)
    perturb(model, FIRST)
    expected = output(model, case.x)
    model.save_pretrained(tmp_path)
    loaded = case.called(peft.PeftModel.from_pretrained(case.base.make(), tmp_path / FIRST, adapter_name=FIRST))
    assert changed(state(model), state(loaded)) == set()
    assert same(output(loaded, case.x), expected)
    with loaded.disable_adapter():
        assert same(output(loaded, case.x), case.base_output)
    with case.declared("merge") as possible:
        loaded.merge_adapter()
    if possible:
        close(output(loaded, case.x), expected)
        close(output(model.merge_and_unload(), case.x), expected)
    assert same(output(loaded.unload(), case.x), case.base_output)


@over(ONE_OF_A_SORT)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injected_into_a_model(case, low_cpu_mem_usage):
    base = case.base.make()
    if case.variant.tuner.uses_shared_state:
        with pytest.raises(ValueError, match="get_peft_model"):
            peft.inject_adapter_in_model(case.variant.config(FIRST), base, FIRST)
        return
    peft.inject_adapter_in_model(case.variant.config(FIRST), base, FIRST)
    case.called(base)  # its layers hand on what they are given
    assert trainable(base) == names_of(base, FIRST)
    perturb(base, FIRST)
    assert same(output(base, case.x), output(case.one(), case.x))
    saved = peft.get_peft_model_state_dict(base, adapter_name=FIRST)
    other = case.base.make()
    peft.inject_adapter_in_model(
        case.variant.config(FIRST),
        other,
        FIRST,
        low_cpu_mem_usage=low_cpu_mem_usage,
        state_dict=saved if low_cpu_mem_usage else None,
    )
    case.called(other)
    result = peft.set_peft_model_state_dict(other, saved, FIRST, low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.unexpected_keys == []
    assert_equal_models(other, base, case.x)
    assert trainable(other) == names_of(other, FIRST)
