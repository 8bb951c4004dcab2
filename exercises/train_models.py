"""The checks of 02's exercises about models: 2.1, 2.2, 2.5 and 2.7. The others, and `CHECKS`, are in `train.py`.

Models are GPT-2s of a few narrow layers, made here; nothing is loaded.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache

import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from exercises import Answer, Wrong
from exercises.answers import Draw, expect, kind, plain
from utils.adapters import attach, scaling_vectors, set_scaling_vectors

LAYERS, WIDTH = 12, 768  # of GPT-2, in whose counts the mistakes of 2.1 are known
PLACES = {  # part of (IA)³ -> {module: whether its input is scaled, and not its output}
    "both": {"attn.c_attn": False, "mlp.c_proj": True},
    "attention": {"attn.c_attn": False},
    "feedforward": {"mlp.c_proj": True},
}
NUDGES = (4e-6, 2e-6, 1e-6, 5e-7, 2.4e-7)  # distances of one factor from 1; float32 has steps of 1.2e-7 there


def tiny_gpt2(seed: int, width: int = 8, layers: int = 2) -> GPT2LMHeadModel:
    """A random GPT-2 of narrow layers without dropout, whose biases and norms are random too."""
    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=width, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.config.loss_type = "ForCausalLM"
    return model.eval()


def adapted(draw: Draw, seed: int, **size: int) -> PeftModel:
    """A tiny GPT-2 with an (IA)³ adapter whose vectors are not 1."""
    with torch.random.fork_rng(devices=[]):
        model = attach(tiny_gpt2(seed, **size), "ia3")
    set_scaling_vectors(model, {key: draw.factors(len(l)) for key, l in scaling_vectors(model).items()})
    return model.eval()


def check_config(answer: Answer, seed: int) -> None:
    """2.1: what the configuration says, and what peft builds from it, module by module, on a GPT-2 of two layers."""
    for part, right in PLACES.items():
        config = answer(part)
        if type(config) is not IA3Config:
            raise Wrong(f"an IA3Config is due, not a {kind(config)}")
        for field, due in (("task_type", "CAUSAL_LM"), ("fan_in_fan_out", True), ("init_ia3_weights", True)):
            if plain_field(config, field) != due:  # peft itself sets the second one right when it builds
                raise Wrong(f"{part}: {field} must be {due}")
        layers = built(config, part)
        found = {name.partition(".")[2]: layer.is_feedforward for name, layer in layers.items()}
        numbers = LAYERS // 2 * sum(layer.ia3_l["default"].numel() for layer in layers.values())
        if found != right or len(layers) != 2 * len(right):
            raise Wrong(f"{part}: {numbers:,} numbers on GPT-2: {misplaced(found, right)}")


def built(config: IA3Config, part: str) -> dict[str, BaseTunerLayer]:
    """The modules that peft scales by `config`, by block and name ("0.attn.c_attn")."""
    with torch.device("meta"):
        size = {"n_layer": 2, "n_embd": WIDTH, "vocab_size": 8, "n_positions": 8}
        bare = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    try:
        modules = get_peft_model(bare, config).named_modules()
    except ValueError:
        raise Wrong(f"{part}: peft refuses it: no module of GPT-2 ends with the name of a target") from None
    return {name.rpartition(".h.")[2]: module for name, module in modules if isinstance(module, BaseTunerLayer)}


def misplaced(found: dict[str, bool], right: dict[str, bool]) -> str:
    """The likeliest cause why the places `found` are not those of `right` (see `PLACES`)."""
    extra = found.keys() - right.keys()
    if "attn.c_proj" in extra:
        unlisted = found.get("mlp.c_proj") is False
        also = ", and feedforward_modules is missing" if unlisted else ". Write mlp.c_proj"
        return f"bare c_proj also matches attn.c_proj{also}"
    if "mlp.c_fc" in extra:
        return "c_fc is scaled, before the activation: the count may be right, the place is wrong"
    if found.keys() != right.keys():
        known = {"mlp.c_proj": "the feed-forward layer is scaled too", "attn.c_attn": "attention is scaled too"}
        return known.get("".join(extra), "other modules are scaled than those that were asked for")
    if found == right:
        return "only some of the blocks are scaled"
    if all(found[name] != right[name] for name in right) and len(right) == 2:
        return "the roles are swapped: scale c_attn's output and mlp.c_proj's input"
    if found.get("attn.c_attn"):
        return "c_attn stands in feedforward_modules, so its input is scaled, d instead of 3d"
    return "feedforward_modules lacks mlp.c_proj, so it is scaled on its output, d instead of 4d"


def plain_field(config: IA3Config, name: str) -> object:
    """A field of a configuration as plain text or boolean; an enumeration by its value."""
    value = getattr(config, name)
    return plain(str(value.value) if hasattr(value, "value") else value)


def nearly_base(seed: int, ids: Tensor) -> PeftModel:
    """A tiny GPT-2, one of its factors so near 1 that only some last bits of its logits differ from the base's.

    `torch.allclose` takes the two for equal, `torch.equal` does not.
    """
    with torch.random.fork_rng(devices=[]):
        model = attach(tiny_gpt2(seed), "ia3").eval()
    ones, base = scaling_vectors(model), model(ids).logits.detach()
    for unit, step in itertools.product(range(len(ones["1.feedforward"])), NUDGES):
        nudged = ones["1.feedforward"].clone()
        nudged[unit] += step
        set_scaling_vectors(model, ones | {"1.feedforward": nudged})
        logits = model(ids).logits.detach()
        if torch.allclose(logits, base) and not torch.equal(logits, base):
            break
    return model


def check_identity(answer: Answer, seed: int) -> None:
    """2.2: whether an adapter changes no bit of the logits; the model is left as it was."""
    draw = Draw(seed)
    ids = draw.integers(0, 39, 1, 6)
    with torch.random.fork_rng(devices=[]):
        fresh = attach(tiny_gpt2(seed), "ia3").eval()
    cases = [
        (fresh, True, "a fresh adapter changes nothing, and you say that it does"),
        (
            adapted(draw, seed),
            False,
            "an adapter with other vectors passes: compare with the logits while it is switched off",
        ),
        (nearly_base(seed, ids), False, "a small change passes: equal means torch.equal, every bit, not allclose"),
    ]
    for model, right, cause in cases:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = answer(model, ids)
        found = plain(result)
        if type(found) is not bool:
            raise Wrong(f"True or False is due, not a {kind(result)}: one bool for all logits, as torch.equal gives")
        if any(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
            raise Wrong("the adapter is still switched off afterwards: use `with model.disable_adapter():`")
        if before.keys() != model.state_dict().keys():
            raise Wrong("the adapter is taken off for good: use `with model.disable_adapter():`")
        if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
            raise Wrong("the model's numbers are others afterwards")
        if found != right:
            raise Wrong(cause)


def losses_of(model: PeftModel, ids: Tensor, steps: int, rate: float, make: Callable, zero: bool = True) -> list[float]:
    """Losses before each of `steps` updates of the trainable numbers on one batch (rows, tokens)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = make(parameters, rate), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        if zero:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_overfit(answer: Answer, seed: int) -> None:
    """2.5: a loop that trains the vectors, and only these, on one batch."""
    draw, steps, rate = Draw(seed), 12, 0.1
    ids = draw.integers(0, 39, 2, 6)

    def run(make: Callable, zero: bool = True, steps: int = steps) -> list[float]:
        return losses_of(adapted(Draw(seed), seed), ids, steps, rate, make, zero)

    def adam(parameters: list, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    model = adapted(Draw(seed), seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = answer(model, ids, steps, rate)
    if type(found) not in (list, tuple) or any(type(loss) is not float for loss in found):
        raise Wrong("a list of floats is due: take .item() of each loss")
    if any(".ia3_l." not in n and not torch.equal(p, before[n]) for n, p in model.named_parameters()):
        raise Wrong("frozen weights have moved: give the optimiser what requires a gradient, and nothing else")
    right = run(adam)
    traps = [
        ("gradients add up: call optimizer.zero_grad() in each step", lambda: run(adam, zero=False)),
        ("AdamW's own weight decay is 0.01, and pulls the vectors to 0: pass weight_decay=0.0",
         lambda: run(lambda p, rate: torch.optim.AdamW(p, lr=rate))),
        ("the learning rate is not the one that was passed", lambda: run(lambda p, _: adam(p, 1e-3))),
        ("plain gradient descent: use AdamW", lambda: run(lambda p, rate: torch.optim.SGD(p, lr=rate))),
        ("the losses are those after each step: keep the one from before the update",
         lambda: run(adam, steps=steps + 1)[1:]),
        ("nothing is learned: call loss.backward() and optimizer.step()", [right[0]] * steps),
    ]  # fmt: skip
    if len(found) != steps:
        raise Wrong("one loss for each step is due")
    expect(list(found), right, traps, "the losses are not those of AdamW on the vectors, weight decay 0", 1e-4)


@torch.no_grad()
def last_logits(model: PeftModel, ids: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    """The logits (vocabulary,) after the last token with these vectors, the mean of all rows of `ids`."""
    set_scaling_vectors(model, vectors)
    return model(ids).logits[:, -1].mean(0).double()


def one_changed(vectors: dict[str, Tensor], place: str, unit: int, factor: float) -> dict[str, Tensor]:
    """Copies of the vectors, one factor replaced."""
    changed = {key: l.clone() for key, l in vectors.items()}
    changed[place][unit] = factor
    return changed


UNIT_MISTAKES = {
    "works": "that unit works against the tone: without the right one the tone falls",
    "turned": "the sign is turned round: without the right unit the tone falls",
    "deleted": "a factor of 0 deletes the unit: untouched is 1",
    "alone": "that unit gives the most alone: the one that is missed most is asked for",
    "moved": "that is the factor farthest from 1: to have moved most is not to matter most",
}


def tone_case(seed: int, role: str) -> tuple[PeftModel, Tensor, list[int], list, dict[str, list]]:
    """A model, token ids, two tokens, the right answer about them, and the units to which mistakes lead, by cause."""
    return copy.deepcopy(drawn_case(seed, role))


@cache
def drawn_case(seed: int, role: str) -> tuple[PeftModel, Tensor, list[int], list, dict[str, list]]:
    """`tone_case`, drawn until one unit of `role` clearly carries the most, and each mistake leads elsewhere."""
    for turn in itertools.count():
        draw = Draw(100 * seed + turn)
        model, ids = adapted(draw, 100 * seed + turn, width=4), draw.integers(0, 39, 3, 5)
        vectors = scaling_vectors(model)
        ones = {key: torch.ones_like(l) for key, l in vectors.items()}
        units = [(place, unit) for place, l in vectors.items() for unit in range(len(l))]
        good, bad = torch.cartesian_prod(torch.tensor(draw.order(40)), torch.arange(40)).T
        changed = [ones, vectors]
        changed += [one_changed(vectors, *unit, factor) for factor in (1.0, 0.0) for unit in units]
        changed += [one_changed(ones, *unit, float(vectors[unit[0]][unit[1]])) for unit in units]
        logits = torch.stack([last_logits(model, ids, these) for these in changed])
        set_scaling_vectors(model, vectors)
        tones = logits[:, good] - logits[:, bad]  # (changes, pairs of tokens)
        (base, full), (without, deleted, alone) = tones[:2], tones[2:].view(3, len(units), -1)
        lost, given = (full - without) / (full - base), (alone - base) / (full - base)
        (most, second), (first, _) = lost.topk(2, dim=0)
        moved = max(range(len(units)), key=lambda n: abs(vectors[units[n][0]][units[n][1]] - 1))
        wrong = {"works": lost.abs().argmax(0), "turned": lost.argmin(0), "deleted": deleted.argmin(0),
                 "alone": given.argmax(0), "moved": torch.full_like(first, moved)}  # fmt: skip
        share = given.gather(0, first[None])[0]
        fits = torch.tensor([place.endswith(role) and unit >= 4 for place, unit in units])[first]  # in no first third
        fits &= (full - base > 0.1) & (most > 0.3) & (most < 2) & (most - second > 0.05)
        fits &= (share.abs() > 0.05) & ((share - most).abs() > 0.05)
        for one, other in itertools.combinations([first, *wrong.values()], 2):
            if one is not wrong["works"] or other is not wrong["turned"]:  # these two are mostly one
                fits &= one != other
        if fits.any():
            n = int(fits.int().argmax())
            right = [*units[first[n]], float(most[n]), float(share[n])]
            mistakes = {UNIT_MISTAKES[name]: list(units[chosen[n]]) for name, chosen in wrong.items()}
            return model, ids, [int(good[n]), int(bad[n])], right, mistakes
    raise AssertionError  # never: it counts for ever


def check_tone_unit(answer: Answer, seed: int) -> None:
    """2.7: the factor that carries most of the tone, and the proof: what is lost without it, what it gives alone."""
    for role in ("attention", "feedforward"):
        model, ids, tokens, right, wrong = tone_case(seed, role)
        before = scaling_vectors(model)
        found = plain(answer(model, ids, *tokens))
        if any(not torch.equal(l, before[key]) for key, l in scaling_vectors(model).items()):
            raise Wrong("the model's vectors are others afterwards: put them back")
        if type(found) is not list or len(found) != 4:
            raise Wrong("four things are due: place, unit, the share lost without it, the share given alone")
        place, unit, lost, given = right
        traps = [*wrong.items(), ("count the unit in the whole vector, not in its third", [place, unit % 4])]
        expect(found[:2], [place, unit], traps, "another factor carries more: put each one back to 1, one at a time")
        shares = [
            ("the two shares are exchanged: first what is lost without the unit", [given, lost]),
            ("in per cent: a share is a number around 0 to 1", [100 * lost, 100 * given]),
            ("the share given alone is missing: put all other factors to 1", [lost, 1 - lost]),
            ("the share given alone is missing: put all other factors to 1", [lost, lost]),
        ]
        expect([float(x) if type(x) is int else x for x in found[2:]], [lost, given], shares,
               "a share is a change of the tone, divided by the change from the base to the adapter", 1e-3)  # fmt: skip
