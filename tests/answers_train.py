"""Answers to 02's exercises, for test_exercises.py: a right one in another way, wrong ones with what is said."""

from __future__ import annotations

import torch
from peft import IA3Config

from utils.adapters import scaling_vectors, set_scaling_vectors


def config(targets, feedforward, **fields):
    fields = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True} | fields
    return IA3Config(target_modules=targets, feedforward_modules=feedforward, **fields)


PARTS = {"both": ["c_attn", "mlp.c_proj"], "attention": ["c_attn"], "feedforward": ["mlp.c_proj"]}


def right_config(part, **fields):
    return config(PARTS[part], [name for name in PARTS[part] if name == "mlp.c_proj"], **fields)


def without_fan_in_fan_out(part):
    targets = PARTS[part]
    feedforward = [name for name in targets if name == "mlp.c_proj"]
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)


def only(part, wrong):
    """The right configurations, but for one part."""
    return lambda asked: wrong() if asked == part else right_config(asked)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def base_logits(model, ids):
    with model.disable_adapter():
        return logits(model, ids)


def left_off(model, ids):
    on = logits(model, ids)
    model.base_model.disable_adapter_layers()
    return torch.equal(on, logits(model, ids))


def labels_in_place(ids, mask):
    ids[mask == 0] = -100
    return ids


def loop(make, zero=True, when="before", convert=float, rate=None, unfreeze=False, stop=0):
    def overfit(model, ids, steps, asked):
        if unfreeze:
            model.requires_grad_(True)
        optimizer = make([p for p in model.parameters() if p.requires_grad], rate or asked)
        losses = []
        for _ in range(steps - stop):
            loss = model(input_ids=ids, labels=ids).loss
            if zero:
                optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            if when == "after":
                loss = model(input_ids=ids, labels=ids).loss
            losses.append(convert(loss))
        return losses

    return overfit


def adam(parameters, rate):
    return torch.optim.Adam(parameters, lr=rate)


class Idle:
    def __init__(self, parameters, rate):
        pass

    def zero_grad(self, **_):
        pass

    def step(self):
        pass


def cells(vectors, colour, layer=int, names=("query", "key", "value")):
    found = {}
    for key, vector in vectors.items():
        number, role = key.split(".")
        parts = vector.chunk(3) if role == "attention" else [vector]
        for name, part in zip(names if role == "attention" else [role], parts, strict=True):
            found[layer(number), name] = float(colour(part - 1))
    return max(found, key=found.get)


def mean_move(move):
    return move.abs().mean()


def whole_vectors(vectors):
    moves = {key: float((vector - 1).abs().mean()) for key, vector in vectors.items()}
    layer, role = max(moves, key=moves.get).split(".")
    return int(layer), "attention"


def by_numpy(vectors):
    best = (-1.0, None)
    for key, vector in vectors.items():
        layer, role = key.split(".")
        table = abs(vector.numpy() - 1).reshape(3 if role == "attention" else 1, -1).mean(axis=1)
        names = ["query", "key", "value"] if role == "attention" else ["feedforward"]
        best = max(best, *((float(mean), [int(layer), name]) for mean, name in zip(table, names, strict=True)))
    return best[1]


def tones(model, ids, good, bad, untouched=1.0):
    """The tone of the base and of the adapter; by unit the tone without it, and with it alone."""
    vectors = scaling_vectors(model)
    ones = {place: torch.ones_like(l) for place, l in vectors.items()}

    def tone(start, place=None, unit=0, factor=None):
        changed = {key: l.clone() for key, l in start.items()}
        if place:
            changed[place][unit] = factor
        set_scaling_vectors(model, changed)
        last = logits(model, ids)[:, -1]
        return float((last[:, good] - last[:, bad]).mean())

    units = [(place, unit) for place, l in vectors.items() for unit in range(len(l))]
    without = {unit: tone(vectors, *unit, untouched) for unit in units}
    alone = {(place, unit): tone(ones, place, unit, vectors[place][unit]) for place, unit in units}
    base, full = tone(ones), tone(vectors)
    set_scaling_vectors(model, vectors)
    return base, full, without, alone


def carrier(choose=None, shares=lambda lost, given: (lost, given), place=lambda found: found, **how):
    """An answer to 2.7; `choose(base, full, without, alone)` takes another unit, the others spoil what is returned."""

    def tone_unit(model, ids, good, bad):
        base, full, without, alone = tones(model, ids, good, bad, **how)
        unit = choose(base, full, without, alone) if choose else min(without, key=without.get)
        lost, given = (full - without[unit]) / (full - base), (alone[unit] - base) / (full - base)
        return [*place(unit), *shares(lost, given)]

    return tone_unit


def farthest_moved(model, ids, good, bad):
    vectors = scaling_vectors(model)
    units = [(place, unit) for place, l in vectors.items() for unit in range(len(l))]
    return [*max(units, key=lambda unit: abs(vectors[unit[0]][unit[1]] - 1)), 1.0, 1.0]


def vectors_left_at_one(model, *given):
    found = carrier()(model, *given)
    set_scaling_vectors(model, {place: torch.ones_like(l) for place, l in scaling_vectors(model).items()})
    return found


ANSWERS = {
    "2.1": (
        lambda part: {
            "both": lambda: config(["attn.c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
            "attention": lambda: config(r".*\.attn\.c_attn", []),
            "feedforward": lambda: config({"mlp.c_proj"}, {"mlp.c_proj"}),
        }[part](),
        [
            (only("both", lambda: config(["c_attn", "c_proj"], ["c_proj"])), "73,728 numbers on GPT-2: bare c_proj"),
            (only("both", lambda: config(["c_attn", "mlp.c_proj"], [])), "36,864 numbers on GPT-2: feedforward_mod"),
            (only("both", lambda: config(["c_attn", "mlp.c_proj"], ["c_attn"])), "18,432 numbers on GPT-2: the roles"),
            (only("both", lambda: config(["c_attn", "c_proj"], [])), "46,080 numbers on GPT-2: bare c_proj"),
            (only("attention", lambda: config(["c_attn"], ["c_attn"])), "9,216 numbers on GPT-2: c_attn stands"),
            (lambda part: right_config("both"), "the feed-forward layer is scaled too"),
            (only("feedforward", lambda: config(["c_proj"], ["c_proj"])), "46,080 numbers on GPT-2: bare c_proj"),
            (only("feedforward", lambda: config(["mlp.c_proj"], [])), "9,216 numbers on GPT-2: feedforward_modules"),
            (only("feedforward", lambda: config(["mlp.c_fc"], [])), "the place is wrong"),
            (lambda part: right_config(part, task_type=None), "task_type must be CAUSAL_LM"),
            (lambda part: config(["c_attn"], ["mlp.c_proj"]), "should be a subset of `target_modules`"),
            (lambda part: right_config(part, fan_in_fan_out=False), "fan_in_fan_out must be True"),
            (without_fan_in_fan_out, "fan_in_fan_out must be True"),
            (only("feedforward", lambda: config(["c_attn", "mlp.c_proj"], [])), "GPT-2: attention is scaled too"),
            (only("both", lambda: config(["c_attn", "mlp.c_proj"], ["c_attn", "mlp.c_proj"])), "c_attn stands in"),
            (only("both", lambda: config(["c_attn", "c_fc"], [])), "the place is wrong"),
            (only("attention", lambda: config([r"h.0.attn.c_attn"], [])), "only some of the blocks"),
            (only("both", lambda: config(["key", "value"], [])), "peft refuses it"),
            (lambda part: {"target_modules": PARTS[part]}, "an IA3Config is due, not a dict"),
        ],
    ),
    "2.2": (
        lambda model, ids: bool((base_logits(model, ids) == logits(model, ids)).all()),
        [
            (lambda model, ids: torch.allclose(logits(model, ids), base_logits(model, ids), atol=1e-4), "allclose"),
            (lambda model, ids: torch.equal(logits(model, ids), logits(model, ids)), "while it is switched off"),
            (lambda model, ids: not torch.equal(logits(model, ids), base_logits(model, ids)), "fresh adapter changes"),
            (left_off, "still switched off"),
            (lambda model, ids: torch.equal(logits(model, ids), logits(model.unload(), ids)), "taken off for good"),
            (lambda model, ids: logits(model, ids) == base_logits(model, ids), "True or False is due"),
            (lambda model, ids: torch.equal(logits(model, ids), logits(model.base_model, ids)), "switched off"),
            (lambda model, ids: torch.allclose(logits(model, ids), base_logits(model, ids)), "allclose"),
            (lambda model, ids: torch.allclose(logits(model, ids), base_logits(model, ids), atol=1e-6), "allclose"),
            (lambda model, ids: logits(model, ids) == base_logits(model, ids), "one bool for all logits"),
        ],
    ),
    "2.3": (
        lambda ids, mask: torch.where(mask.bool(), ids, torch.tensor(-100)),
        [
            (lambda ids, mask: ids.masked_fill(ids == 0, -100), "every end-of-text token"),
            (lambda ids, mask: ids.clone(), "padding is not masked"),
            (lambda ids, mask: ids.masked_fill(mask == 1, -100), "turned round"),
            (lambda ids, mask: ids.masked_fill(mask == 0, -100).roll(-1, 1), "are shifted"),
            (lambda ids, mask: ids * mask - 1 + mask, "neither its own token"),
            (lambda ids, mask: ids.masked_fill(mask == 0, -1), "neither its own token"),
            (labels_in_place, "changed in place"),
            (lambda ids, mask: ids[:, 1:], "a shape is"),
        ],
    ),
    "2.4": (
        lambda start, rate, decay, steps: start if steps == 0 else decay_by_loop(start, rate, decay, steps),
        [
            (lambda start, rate, decay, steps: 1 + (start - 1) * (1 - rate * decay) ** steps, "goes to 1"),
            (lambda start, rate, decay, steps: start * (1 - rate * decay), "one step"),
            (lambda start, rate, decay, steps: start * (1 - rate * decay * steps), "straight line"),
            (lambda start, rate, decay, steps: start * (1 - decay) ** steps, "rate is missing"),
            (lambda start, rate, decay, steps: start * (1 - rate) ** steps, "decay is missing"),
            (lambda start, rate, decay, steps: start, "nothing decays"),
            (lambda start, rate, decay, steps: start * (1 + rate * decay) ** steps, "it grows"),
        ],
    ),
    "2.5": (
        loop(adam, convert=lambda loss: loss.detach().numpy().item()),
        [
            (loop(adam, zero=False), "gradients add up"),
            (loop(lambda p, rate: torch.optim.AdamW(p, lr=rate)), "weight decay is 0.01"),
            (loop(adam, rate=1e-3), "learning rate is not"),
            (loop(lambda p, rate: torch.optim.SGD(p, lr=rate)), "plain gradient descent"),
            (loop(adam, when="after"), "after each step"),
            (loop(Idle), "nothing is learned"),
            (loop(adam, convert=lambda loss: loss.detach()[None]), "a list of floats"),
            (loop(adam, convert=lambda loss: loss), "a list of floats"),
            (loop(adam, convert=lambda loss: loss.detach()), "a list of floats"),
            (lambda *given: torch.tensor(loop(adam)(*given)), "a list of floats"),
            (lambda *given: torch.tensor(loop(adam)(*given)).numpy(), "a list of floats"),
            (loop(adam, unfreeze=True), "frozen weights have moved"),
            (loop(adam, stop=1), "one loss for each step"),
            (loop(lambda p, rate: torch.optim.RMSprop(p, lr=rate)), "not those of AdamW"),
        ],
    ),
    "2.6": (
        by_numpy,
        [
            (lambda vectors: cells(vectors, lambda move: move.mean()), "cancel"),
            (lambda vectors: cells(vectors, lambda move: move.abs().max()), "one unit decides"),
            (lambda vectors: cells(vectors, lambda move: move.abs().sum()), "favours the longest"),
            (whole_vectors, "three groups"),
            (lambda vectors: cells(vectors, lambda move: move.abs().mean(), layer=str), "make it an integer"),
            (lambda vectors: cells(vectors, lambda move: -move.abs().mean()), "moved the least"),
            (lambda vectors: cells(vectors, lambda move: abs(move.mean())), "cancel"),
            (lambda vectors: cells(vectors, lambda move: move.square().mean()), "squares"),
            (lambda vectors: cells(vectors, lambda move: move.norm()), "squares"),
            (lambda vectors: cells(vectors, lambda move: move.std()), "squares"),
            (lambda vectors: cells(vectors, mean_move, names=["q", "k", "v"]), "the groups are"),
            (lambda vectors: cells(vectors, mean_move)[::-1], "the groups are"),
            (lambda vectors: cells(vectors, mean_move, names=["value", "query", "key"]), "in this order"),
            (lambda vectors: (0, "query"), "another cell"),
            (lambda vectors: "value", "a pair is due"),
        ],
    ),
    "2.7": (
        carrier(),
        [
            (
                carrier(lambda base, full, without, _: max(without, key=lambda u: abs(full - without[u]))),
                "works against",
            ),
            (carrier(lambda base, full, without, _: max(without, key=without.get)), "without the right"),
            (carrier(untouched=0.0), "a factor of 0 deletes"),
            (carrier(lambda base, full, without, alone: max(alone, key=alone.get)), "gives the most alone"),
            (farthest_moved, "farthest from 1"),
            (carrier(place=lambda unit: (unit[0], unit[1] % 4)), "not in its third"),
            (carrier(place=lambda unit: ("0.attention", 0)), "another factor carries more"),
            (carrier(shares=lambda lost, given: (given, lost)), "exchanged"),
            (carrier(shares=lambda lost, given: (100 * lost, 100 * given)), "per cent"),
            (carrier(shares=lambda lost, given: (lost, 1 - lost)), "alone is missing"),
            (carrier(shares=lambda lost, given: (lost, lost)), "alone is missing"),
            (carrier(shares=lambda lost, given: (lost / 2, given)), "a share is a change"),
            (carrier(shares=lambda lost, given: ()), "four things are due"),
            (vectors_left_at_one, "put them back"),
        ],
    ),
}


def decay_by_loop(start, rate, decay, steps):
    for _ in range(steps):
        start -= rate * decay * start
    return start


ALSO_RIGHT = {
    "2.1": [lambda part: right_config(part, inference_mode=False)],
    "2.2": [lambda model, ids: (base_logits(model, ids) == logits(model, ids)).all()],
    "2.5": [lambda *given: tuple(loop(adam)(*given))],
}
