"""The checks of notebook 02's exercises: `CHECKS[number](answer, seed)` returns, or raises `Wrong` or `NotYet`.

Models are GPT-2s of two narrow layers, made here; nothing but the files of 2.9 is loaded. Reached through
`checks.check()`. Not for: the exercises' texts and model answers, which stand in the notebook.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from utils.adapters import attach, scaling_vectors, set_scaling_vectors
from utils.answers import Draw, expect, kind, number, plain, tensors, untouched
from utils.checks import Answer, NotYet, Wrong
from utils.runs import RunError, RunRecord
from utils.storage import AdapterError, check_tensors, read_probe

LEAST_MOVED = 1e-3  # a factor that training has moved is farther from 1 than this
MOST_SAID = 110  # characters of another module's message
LAYERS, WIDTH = 12, 768  # of GPT-2, in whose counts the traps of 2.1 are known
PLACES = {"both": ("c_attn", "mlp.c_proj"), "attention": ("c_attn",), "feedforward": ("mlp.c_proj",)}
CONFIG_TRAPS = {  # (part, numbers trained on GPT-2) -> the mistake
    ("both", 73_728): "bare c_proj also matches attn.c_proj. Write mlp.c_proj",
    ("both", 36_864): "feedforward_modules is missing, so mlp.c_proj is scaled on its output, d instead of 4d",
    ("both", 18_432): "the roles are swapped: c_attn is scaled on its output, mlp.c_proj on its input",
    ("both", 46_080): "bare c_proj also matches attn.c_proj, and feedforward_modules is missing",
    ("attention", 9_216): "c_attn stands in feedforward_modules, so its input is scaled, d instead of 3d",
    ("attention", 64_512): "the feed-forward layer is scaled too",
    ("feedforward", 46_080): "bare c_proj also matches attn.c_proj. Write mlp.c_proj",
    ("feedforward", 9_216): "feedforward_modules is missing, so mlp.c_proj is scaled on its output, d instead of 4d",
    ("feedforward", 36_864): "c_fc is scaled on its output, before the activation: right count, wrong place",
    ("feedforward", 64_512): "attention is scaled too",
}


def tiny_gpt2(seed: int, width: int = 8) -> GPT2LMHeadModel:
    """A random GPT-2 of two layers without dropout, whose biases and norms are random too."""
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=width, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
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


def adapted(draw: Draw, seed: int) -> PeftModel:
    """A tiny GPT-2 with an (IA)³ adapter whose vectors are not 1."""
    with torch.random.fork_rng(devices=[]):
        model = attach(tiny_gpt2(seed), "ia3")
    set_scaling_vectors(model, {key: draw.factors(len(l)) for key, l in scaling_vectors(model).items()})
    return model.eval()


def check_config(answer: Answer, seed: int) -> None:
    """2.1: what peft builds from the configuration, module by module, on a GPT-2 of two layers."""
    for part, places in PLACES.items():
        config = answer(part)
        if type(config) is not IA3Config:
            raise Wrong(f"an IA3Config is due, not a {kind(config)}")
        with torch.device("meta"):
            bare = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=WIDTH, vocab_size=8, n_positions=8))
        try:
            layers = {n: m for n, m in get_peft_model(bare, config).named_modules() if isinstance(m, BaseTunerLayer)}
        except ValueError:
            raise Wrong(f"{part}: peft refuses it: targets must exist, feed-forward modules be targets") from None
        numbers = LAYERS // 2 * sum(m.ia3_l["default"].numel() for m in layers.values())
        right = {f"{block}.{place}" for block in ("0", "1") for place in _full_names(places)}
        if {name.split(".h.")[1] for name in layers} != right or any(
            m.is_feedforward != name.endswith("mlp.c_proj") for name, m in layers.items()
        ):
            cause = CONFIG_TRAPS.get((part, numbers), "other modules are scaled than those that were asked for")
            raise Wrong(f"{part}: {numbers:,} numbers on GPT-2: {cause}")
        for field, due in (("task_type", "CAUSAL_LM"), ("fan_in_fan_out", True), ("init_ia3_weights", True)):
            if plain_field(config, field) != due:
                raise Wrong(f"{part}: {field} must be {due}")


def _full_names(places: tuple[str, ...]) -> list[str]:
    return ["attn.c_attn" if place == "c_attn" else place for place in places]


def plain_field(config: IA3Config, name: str) -> object:
    """A field of a configuration as plain text or boolean; an enumeration by its value."""
    value = getattr(config, name)
    return plain(str(value.value) if hasattr(value, "value") else value)


def check_identity(answer: Answer, seed: int) -> None:
    """2.2: whether an adapter changes no bit of the logits; the model is left as it was."""
    draw = Draw(seed)
    ids = draw.integers(0, 39, 1, 6)
    with torch.random.fork_rng(devices=[]):
        fresh, nearly = (attach(tiny_gpt2(seed), "ia3").eval() for _ in range(2))
    nudged = scaling_vectors(nearly)
    nudged["1.feedforward"][:] = 1 + 2e-6
    set_scaling_vectors(nearly, nudged)
    moved = adapted(draw, seed)
    cases = [
        (fresh, True, "a fresh adapter changes nothing, and you say that it does"),
        (moved, False, "an adapter with other vectors passes: compare with the logits while it is switched off"),
        (nearly, False, "a small change passes: equal means torch.equal, every bit, not allclose"),
    ]
    for model, right, cause in cases:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = plain(answer(model, ids))
        if type(found) is not bool:
            raise Wrong(f"True or False is due, not a {kind(found)}")
        if any(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
            raise Wrong("the adapter is still switched off afterwards: use `with model.disable_adapter():`")
        if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
            raise Wrong("the model's numbers are others afterwards")
        if found != right:
            raise Wrong(cause)


def packed(documents: list[list[int]], length: int, end: int) -> list[list[int]]:
    """Blocks of `length`, token by token: each document, then `end`; a last block that is not full is left out."""
    blocks, block = [], []
    for document in documents:
        for token in [*document, end]:
            block.append(token)
            if len(block) == length:
                blocks.append(block)
                block = []
    return blocks


def check_packing(answer: Answer, seed: int) -> None:
    """2.3: one stream, an end after each document, full blocks only."""
    draw = Draw(seed)
    for exact in (False, True):
        length, end = draw.integer(3, 5), 99
        documents = [draw.integers(1, 9, draw.integer(1, 9)).tolist() for _ in range(6)]
        left = (sum(map(len, documents)) + len(documents)) % length
        documents[-1] += [1] * ((length - left) % length if exact else (length - left + 2) % length)
        right = packed(documents, length, end)
        whole = [token for document in documents for token in [*document, end]]
        rest = whole[len(right) * length :]
        joined = [token for n, document in enumerate(documents) for token in ([end] if n else []) + document]
        traps = [
            ("the end-of-text tokens are missing: one after each document", _cut(sum(documents, []), length)),
            ("the last document has no end-of-text token", _cut(joined, length)),
            ("the end-of-text token comes first: it belongs after each document", _cut(_first(documents, end), length)),
            ("the last block is not full: leave it out", [*right, rest]),
            ("the last block is filled up: leave it out", [*right, [*rest, *[end] * (length - len(rest))]]),
            ("the last block is full and is left out", right[:-1]),
            ("each document is cut alone, and its rest is lost: make one stream first",
             [block for document in documents for block in _cut([*document, end], length)]),
        ]  # fmt: skip
        hint = "the blocks, one after the other, are not the stream: some token is lost, doubled or in another place"
        expect(plain(untouched(answer, documents, length, end)), right, traps, hint)


def _cut(stream: list[int], length: int) -> list[list[int]]:
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def _first(documents: list[list[int]], end: int) -> list[int]:
    return [token for document in documents for token in [end, *document]]


def check_labels(answer: Answer, seed: int) -> None:
    """2.4: -100 on padding only, although padding and end of text are one token."""
    draw, end = Draw(seed), 0
    for left in (False, True):
        lengths = [7, *(draw.integer(2, 5) for _ in range(3))]
        ids, mask = torch.full((4, 7), end), torch.zeros(4, 7, dtype=torch.long)
        for row, length in enumerate(lengths):
            place = slice(7 - length, 7) if left else slice(0, length)
            ids[row, place] = torch.cat([draw.integers(1, 9, length - 1), torch.tensor([end])])
            mask[row, place] = 1
        right = torch.tensor([[t if m else -100 for t, m in zip(*row, strict=True)] for row in
                              zip(ids.tolist(), mask.tolist(), strict=True)])  # fmt: skip
        traps = [
            ("every end-of-text token is masked, the true one too: go by the mask", ids.masked_fill(ids == end, -100)),
            ("the padding is not masked", ids.clone()),
            ("the mask is turned round: it is 1 where there is text", ids.masked_fill(mask == 1, -100)),
            ("the labels are shifted: GPT-2 shifts them itself", torch.roll(right, -1, 1)),
        ]
        found = tensors(untouched(answer, ids, mask))
        traps = [(cause, (wrong,)) for cause, wrong in traps]
        expect(found, (right,), traps, "a label is neither its own token nor -100 on padding")


def decayed(start: float, rate: float, decay: float, steps: int) -> float:
    """What AdamW makes of one number in `steps` steps without a gradient."""
    parameter = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay)
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return parameter.item()


def check_decay(answer: Answer, seed: int) -> None:
    """2.5: one factor under weight decay alone."""
    draw = Draw(seed)
    for start in (draw.integer(120, 180) / 100, draw.integer(30, 80) / 100, 1.0):
        rate, decay, steps = draw.integer(1, 5) / 100, draw.integer(1, 5) / 10, draw.integer(20, 60)
        right = decayed(start, rate, decay, steps)
        traps = [
            ("that goes to 1: weight decay pulls to 0", 1 + (start - 1) * (1 - rate * decay) ** steps),
            ("that is one step: the pull is repeated", start * (1 - rate * decay)),
            ("that is a straight line: each step takes a share of what is left", start * (1 - rate * decay * steps)),
            ("the learning rate is missing: AdamW multiplies by 1 - rate * decay", start * (1 - decay) ** steps),
            ("the decay is missing: AdamW multiplies by 1 - rate * decay", start * (1 - rate) ** steps),
            ("nothing decays", start),
            ("it grows: the sign is turned round", start * (1 + rate * decay) ** steps),
        ]
        expect(number(answer(start, rate, decay, steps)), right, traps, "a step multiplies by 1 - rate * decay", 1e-6)


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
    """2.6: a loop that trains the vectors, and only these, on one batch."""
    draw, steps, rate = Draw(seed), 12, 0.1
    ids = draw.integers(0, 39, 2, 6)

    def run(make: Callable, zero: bool = True, steps: int = steps) -> list[float]:
        return losses_of(adapted(Draw(seed), seed), ids, steps, rate, make, zero)

    def adam(parameters: list, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    model = adapted(Draw(seed), seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = plain(answer(model, ids, steps, rate))
    if type(found) is not list or any(type(loss) is not float for loss in found):
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
    expect(found, right, traps, "the losses are not those of AdamW on the vectors, weight decay 0", 1e-4)


def mean_moves(vectors: dict[str, Tensor], move: Callable = lambda part: (part - 1).abs().mean()) -> dict:
    """`move` of each part of the vectors: {[layer, group]: number}."""
    moves = {}
    for key, vector in vectors.items():
        layer, role = key.split(".")
        parts = {role: vector}
        if role == "attention":
            parts = dict(zip(("query", "key", "value"), vector.chunk(3), strict=True))
        moves |= {(int(layer), group): float(move(part)) for group, part in parts.items()}
    return moves


def check_heatmap(answer: Answer, seed: int) -> None:
    """2.7: the cell of the heat map that is farthest from 1."""
    draw, d = Draw(seed), 6
    for group in ("query", "value", "feedforward"):
        vectors = {}
        for layer in range(11):
            vectors[f"{layer}.attention"] = 1 + 0.02 * draw.normal(3 * d)
            vectors[f"{layer}.feedforward"] = 1 + 0.02 * draw.normal(4 * d)
        to_and_fro = 0.3 * (-1.0) ** torch.arange(4 * d)  # far from 1, and 0 on average
        layers = draw.order(11)[:4]
        if group == "feedforward":
            vectors[f"{layers[0]}.feedforward"] = 1 + to_and_fro
        else:
            third = ("query", "key", "value").index(group)
            vectors[f"{layers[0]}.attention"][third * d : (third + 1) * d] = 1 + to_and_fro[:d]
            vectors[f"{layers[3]}.feedforward"] += 0.13 * (-1.0) ** torch.arange(4 * d)  # the largest sum
            vectors[f"{layers[1]}.attention"] += 0.15 * (-1.0) ** torch.arange(3 * d)  # the largest whole vector
        vectors[f"{layers[1]}.attention"][d : 2 * d] = 1.1  # the largest signed mean
        vectors[f"{layers[2]}.attention"][0] = 0.3  # the largest single factor
        right = farthest(vectors)
        traps = [
            ("moves up and down cancel: take the distance from 1 of each factor, then the mean",
             farthest(vectors, lambda part: (part - 1).mean())),
            ("one unit decides: take the mean over the group", farthest(vectors, lambda part: (part - 1).abs().max())),
            ("a sum favours the longest group: take the mean", farthest(vectors, lambda part: (part - 1).abs().sum())),
            ("that is the cell that moved the least", farthest(vectors, lambda part: -(part - 1).abs().mean())),
            ("the layer is the text of the key: make it an integer", [str(right[0]), right[1]]),
        ]  # fmt: skip
        found = plain(untouched(answer, vectors))
        if type(found) is list and len(found) == 2 and found[1] == "attention":
            raise Wrong("attention is three groups: cut its vector into query, key and value")
        if type(found) is not list or len(found) != 2:
            raise Wrong("a pair is due: the layer, an integer, and the group's name")
        expect(found, right, traps, "another cell is farther from 1")


def farthest(vectors: dict[str, Tensor], move: Callable = lambda part: (part - 1).abs().mean()) -> list:
    """[layer, group] with the largest `move`."""
    moves = mean_moves(vectors, move)
    return list(max(moves, key=moves.get))


def check_files(answer: Answer, seed: int) -> None:
    """2.9: the adapter that 02 has saved and the record of its run. The grader also measures both on other reviews."""
    folder = answer.function
    if not isinstance(folder, Path):
        raise NotYet if folder is None or folder is ... else Wrong("a folder is due: artifacts_dir(profile)")
    adapter, record = folder / "adapters" / "positive", folder / "train" / "positive" / "run.json"
    if not adapter.exists() or not record.exists():
        raise NotYet
    try:
        probe, run = read_probe(adapter), RunRecord.load(record)
        check_tensors(adapter)
    except AdapterError as error:
        raise Wrong(f"the adapter is damaged: {str(error).partition(': ')[2] or 'save it again'}"[:MOST_SAID]) from None
    except RunError:
        raise Wrong("train/positive/run.json is damaged: delete it and run the training again") from None
    vectors = load_file(adapter / "adapter_model.safetensors")
    if any(not name.endswith("ia3_l") for name in vectors):
        raise Wrong("the adapter holds other tensors than the vectors of (IA)³")
    if max(float((vector - 1).abs().max()) for vector in vectors.values()) < LEAST_MOVED:
        raise Wrong("every factor is 1: save the adapter after its training")
    if run.status != "finished" or not run.history or run.history[-1]["step"] != run.config["steps"]:
        raise Wrong("the curve is cut off: let the training run to its end")
    if (probe["base_fingerprint"], probe.get("config_id")) != (run.config["base"], run.config_id):
        raise Wrong("adapter and curve come from different runs: run 02 from top to bottom")
    if not run.metrics.get("best_loss", math.inf) < run.metrics.get("start_loss", -math.inf):
        raise Wrong("the held-out loss has not fallen: nothing was learned")


CHECKS = {
    "2.1": check_config,
    "2.2": check_identity,
    "2.3": check_packing,
    "2.4": check_labels,
    "2.5": check_decay,
    "2.6": check_overfit,
    "2.7": check_heatmap,
    "2.9": check_files,
}
