"""What training holds and moves when the model grows: docs/scale.md's table."""

FLOAT32, ADAMW = 4, 8  # bytes a number; of both moments (Kingma and Ba 2015)


def training_bytes(parameters: int, trained: int, weight: int = 2) -> dict[str, int]:
    """Bytes of training `trained` float32 numbers beside a frozen base of `parameters` numbers of `weight` bytes each.

    "file": the trained numbers. "held": by each data-parallel process, with gradients and AdamW's moments, activations
    apart; where all is trained there is no frozen base beside. "all-reduced": the gradients, once a step, whatever the
    batch; of W processes in a ring each sends 2 (W - 1) / W of it (Patarasu and Yuan 2009).
    """
    frozen = 0 if trained == parameters else weight * parameters
    moved = FLOAT32 * trained
    return {
        "file": FLOAT32 * trained,
        "held": frozen + FLOAT32 * trained + moved + ADAMW * trained,
        "all-reduced": moved,
    }
