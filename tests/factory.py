"""Synthetic records that follow the shape of real ones, cheap enough to make by the hundred."""

from types import SimpleNamespace

import numpy as np

from lib.spec import MoESpec, RunSpec


def record(
    seed=0,
    *,
    spec=None,
    top1=70.0,
    images=200,
    classes=10,
    experts=4,
    blocks=(0, 1, 2, 3),
    tokens=17,
    probes=12,
    per_image=False,
    epochs=3,
    class_names=None,
    rng=None,
    status="ok",
    difficulty=None,
):
    """One record. Routing sharpens with depth: at the deepest layer class c prefers expert c %
    experts.

    difficulty: (images,) in [0, 1): an image is correct when it lies below the accuracy, plus seed
    noise; shared by seeds.
    """
    rng = rng or np.random.default_rng(seed)
    spec = spec or RunSpec(
        moe=MoESpec(layers=len(blocks), experts=experts, router="image" if per_image else "token")
    )
    label = np.arange(images) % classes
    hard = np.random.default_rng(99).random(images) if difficulty is None else difficulty
    correct = (hard + rng.normal(0, 0.05, images)) < top1 / 100
    pred = np.where(correct, label, (label + 1) % classes)
    layers, by_class, by_position = [], [], []
    for depth, block in enumerate(blocks):
        sharp = (depth + 1) / len(blocks)
        p = np.full((classes, experts), (1 - sharp) / experts)
        p[np.arange(classes), np.arange(classes) % experts] += sharp
        p /= p.sum(1, keepdims=True)
        assignments = images // classes * (1 if per_image else tokens)  # of a class
        counts = np.stack([rng.multinomial(assignments, row) for row in p])
        share = counts.sum(0) / counts.sum()
        by_class.append(counts)
        if per_image:
            by_position.append(np.tile(counts.sum(0), (tokens, 1)))
        else:
            by_position.append(np.stack([rng.multinomial(images, share) for _ in range(tokens)]))
        layers.append(
            {
                "block": block,
                "load": share.tolist(),
                "entropy": float(np.log(experts) * (1.05 - sharp)),
                "weight": 1 / experts + sharp / 2,
                "dropped": 0.0,
                "experts_per_image": 1.0 if per_image else 3.2,
            }
        )
    first = rng.integers(0, experts, (len(blocks), probes, 1 if per_image else tokens))
    history = [{"epoch": 0.0, "val_top1": 10.0, "val_loss": 2.3}]
    history += [
        {
            "epoch": float(e),
            "val_top1": top1 - 30 / 2**e,
            "val_loss": 2.3 / (1 + e),
            "train_loss": 2.0 / (1 + e),
            "balance_loss": 0.01,
            "lr": 1e-3,
        }
        for e in range(1, epochs + 1)
    ]
    arrays = {
        "test_pred": pred,
        "test_label": label,
        "class_expert": np.array(by_class, np.int32),
        "position_expert": np.array(by_position, np.int32),
        "probe_index": np.arange(probes),
        "token_expert": np.broadcast_to(first, (len(blocks), probes, tokens)).astype(np.int16),
    }
    arrays["checker_expert"] = arrays["token_expert"][:, 0]
    side = int(round((tokens - 1) ** 0.5))
    arrays["cam"] = rng.random((probes, 4 * side, 4 * side)).astype(np.float16)
    arrays["picture"] = rng.integers(0, 255, (probes, 3, 12, 12)).astype(np.uint8)
    arrays["hidden"] = rng.random((probes, 16)) < 0.75
    accuracy = {"n": images, "top1": 100 * float((pred == label).mean()), "loss": 1.0}
    return SimpleNamespace(
        spec=spec.but(seed=seed),
        id=spec.but(seed=seed).id,
        status=status,
        test=accuracy,
        val=dict(accuracy),
        history=history,
        curve={"step": list(range(0, 300, 10)), "loss": list(2.3 * np.exp(-np.arange(30) / 12))},
        moe=layers,
        cost={"params_stored": 30_000_000, "params_active": 22_000_000, "macs": 5.5e9},
        timing={
            "train_seconds": 10.0,
            "train_images_per_s": 400.0,
            "eval_images_per_s": 1600.0,
            "peak_rss_mib": 900.0,
        },
        weights=None,
        environment={},
        code="",
        created="2025-01-01",
        arrays=arrays,
        class_names=class_names or [f"class {c}" for c in range(classes)],
    )
