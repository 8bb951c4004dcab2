"""Answers to 03's exercises, for test_exercises.py: a right one in another way, wrong ones with what is said."""

from __future__ import annotations

import copy

import torch
from peft import IA3Config, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load, save


def by_hooks(base, file, ids, change=lambda module, l: l):
    """An answer to 3.1 with hooks; `change(module, vector)` is what a module is scaled by."""
    model = copy.deepcopy(base)
    for name, l in load(file).items():
        place = name.removeprefix("base_model.model.").removesuffix(".ia3_l")
        module, l = model.get_submodule(place), change(place[-6:], l)
        if place.endswith("c_attn"):
            module.register_forward_hook(lambda _, __, output, l=l: output * l)
        else:
            module.register_forward_pre_hook(lambda _, inputs, l=l: (inputs[0] * l,))
    with torch.no_grad():
        return model(ids).logits


def flat(change=lambda module, l: l):
    """`by_hooks` with flat vectors."""
    return lambda base, file, ids: by_hooks(base, file, ids, lambda module, l: change(module, l.flatten()))


def attention(change):
    return lambda module, l: change(l) if module == "c_attn" else l


def sorted_names(base, file, ids):
    tensors = load(file)
    for role in ("c_attn", "c_proj"):
        names = [name for name in tensors if role in name]
        right = sorted(names, key=lambda name: int(name.split(".")[4]))
        tensors |= dict(zip(right, [tensors[name] for name in sorted(names)], strict=True))
    return flat()(base, save(tensors), ids)


def by_peft(base, file, ids):
    places = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    model = get_peft_model(base, IA3Config(fan_in_fan_out=True, **places))
    set_peft_model_state_dict(model, load(file))
    return model(ids).logits


def into_the_base(base, file, ids):
    with torch.no_grad():
        for name, l in load(file).items():
            layer = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".ia3_l"))
            if "c_attn" in name:
                layer.weight *= l.flatten()
                layer.bias *= l.flatten()
            else:
                layer.weight *= l.flatten()[:, None]
        return base(ids).logits


def by_weights(base, file, ids):
    return into_the_base(copy.deepcopy(base), file, ids)


def merged(weight, bias, l, feedforward):
    matrix = torch.diag(l)
    return [matrix @ weight, bias] if feedforward else [weight @ matrix, matrix @ bias]


def other_side(weight, bias, l, feedforward):
    return (weight * l, bias) if feedforward else (weight * l[:, None], bias * l)


def bias_of(attention, feedforward):
    """The right weight, and a bias scaled in these roles."""
    return lambda w, b, l, f: (merged(w, b, l, f)[0], b * l if (feedforward if f else attention) else b)


def merge_in_place(weight, bias, l, feedforward):
    weight *= l[:, None] if feedforward else l
    return weight, bias if feedforward else bias * l


def stack(output, vectors, names, missing=1.0):
    base = torch.full_like(output[0, 0], missing)
    return torch.stack([vectors.get(name, base) for name in names])


def rows_by_loop(output, vectors, names):
    result = output.clone()
    for row, name in enumerate(names):
        if name is not None:
            result[row] = result[row] * vectors[name]
    return result


def rows_in_place(output, vectors, names):
    for row, name in enumerate(names):
        output[row] *= vectors.get(name, 1.0)
    return output


def blend(adapters, strengths, places=None, missing=1.0, start=1.0, away=1.0):
    places = {place for adapter in adapters for place in adapter} if places is None else places
    result = {}
    for place in places:
        ones = next(torch.ones_like(adapter[place]) for adapter in adapters if place in adapter)
        moves = [a * (d.get(place, missing * ones) - away) for d, a in zip(adapters, strengths, strict=True)]
        result[place] = start * ones + sum(moves)
    return result


def one_by_one(adapters, strengths, step):
    result = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for place, l in adapter.items():
            result[place] = step(result.get(place, torch.ones_like(l)), strength * (l - 1))
    return result


def blend_by_powers(adapters, strengths):
    result = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for place, l in adapter.items():
            result[place] = result.get(place, 1) * l**strength
    return result


def blend_in_place(adapters, strengths):
    result = adapters[0]
    for place, l in blend(adapters, strengths).items():
        result[place] = l
    return result


def in_all(adapters):
    return set.intersection(*(set(adapter) for adapter in adapters))


ANSWERS = {
    "3.1": (
        flat(),
        [
            (lambda base, file, ids: by_hooks(base, file, ids), "scales tokens"),
            (flat(lambda module, l: torch.ones_like(l)), "nothing is loaded"),
            (
                flat(lambda module, l: l if module == "c_attn" else torch.ones_like(l)),
                "feed-forward's vectors are",
            ),
            (flat(attention(torch.ones_like)), "attention's vectors are missing"),
            (sorted_names, "10 comes before 2"),
            (flat(attention(lambda l: torch.cat([torch.ones(8), l[8:]]))), "the queries are left alone"),
            (flat(attention(lambda l: torch.cat([l[:8], l[16:], l[8:16]]))), "keys and values are exchanged"),
            (flat(lambda module, l: l + 1), "not those of peft"),
            (into_the_base, "the base is another one afterwards"),
            (by_peft, "this is peft"),
            (lambda base, file, ids: flat()(base, file, ids).tolist(), "a tensor is due"),
        ],
    ),
    "3.2": (
        merged,
        [
            (bias_of(attention=False, feedforward=False), "attention: the bias is not scaled"),
            (other_side, "attention: scale the weight's columns"),
            (lambda w, b, l, f: (w * l, b * l) if not f else other_side(w, b, l, f), "scale the weight's rows"),
            (lambda w, b, l, f: (w * (l[:, None] if f else l), b * l), "feed-forward: the bias is scaled"),
            (lambda w, b, l, f: (w.clone(), b.clone()), "nothing is merged"),
            (lambda w, b, l, f: (merged(w, b, l, f)[0].T, merged(w, b, l, f)[1]), "transposed"),
            (lambda w, b, l, f: (w + l[:, None], b) if f else (w + l, b + l), "is added: it multiplies"),
            (lambda w, b, l, f: merged(w, b, l, not f), "the two roles are exchanged"),
            (merge_in_place, "changed in place"),
            (lambda w, b, l, f: merged(w, b, l, f)[0], "2 tensors are due"),
        ],
    ),
    "3.3": (
        rows_by_loop,
        [
            (lambda output, vectors, names: output * stack(output, vectors, names)[0], "first row's vector"),
            (lambda output, vectors, names: output * stack(output, vectors, names)[-1], "last row's vector"),
            (lambda output, vectors, names: output * stack(output, vectors, names), "mixed up"),
            (lambda output, vectors, names: output * stack(output, vectors, names).mean(0), "vectors are mixed"),
            (lambda output, vectors, names: output * stack(output, vectors, names, 0.0)[:, None], "not 0"),
            (lambda output, vectors, names: output.clone(), "nothing is scaled"),
            (lambda output, vectors, names: output + stack(output, vectors, names)[:, None], "are added"),
            (lambda output, vectors, names: output * torch.stack([vectors[n] for n in names])[:, None], "KeyError"),
            (rows_in_place, "changed in place"),
        ],
    ),
    "3.4": (
        blend,
        [
            (lambda ds, a: blend(ds, a, missing=0, start=0, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, start=0, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, missing=0, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, away=0), "a sum of the vectors"),
            (lambda ds, a: blend(ds, a, start=0), "the 1 is missing"),
            (lambda ds, a: blend(ds, a, missing=0), "a missing place is taken for 0"),
            (lambda ds, a: one_by_one(ds, a, lambda before, move: 1 + move), "overwrites"),
            (lambda ds, a: one_by_one(ds, a, lambda before, move: before * (1 + move)), "multiplied"),
            (blend_by_powers, "multiplied"),
            (lambda ds, a: blend(ds, [x / (sum(a) or 1) for x in a]), "divided by their sum"),
            (lambda ds, a: blend(ds, [1.0] * len(a)), "strengths are ignored"),
            (lambda ds, a: blend(ds, a, places=list(ds[0])), "first adapter lacks"),
            (lambda ds, a: blend(ds, a, places=in_all(ds)), "some adapter lacks"),
            (lambda ds, a: list(blend(ds, a).values()), "a dictionary is due"),
            (blend_in_place, "changed in place"),
        ],
    ),
}


def exchanged(l):
    return torch.cat([l[8:16], l[:8], l[16:]])


ALSO_RIGHT = {"3.1": [by_weights, flat(attention(exchanged))]}  # only the product of a query's and a key's factor acts
