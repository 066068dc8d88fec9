"""Training inside a budget of wall-clock time: the rate falls to 0 as the time runs out, on any machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attncompile.models.trained.muon import Muon
from attncompile.models.trained.recipe import Phase, Training
from attncompile.models.trained.weights import save

_WARM_UP = 100  # steps
_EVERY = 60.0  # seconds from one checkpoint to the next
_CLIP = 1.0


@dataclass(slots=True)
class Run:
    """What is trained, where and for how long. ``seconds`` count from the start of the process, evaluation included;
    ``steps`` ends the run earlier. ``state`` is a checkpoint to write and, where the file is there, to go on from.
    """

    name: str
    recipe: Training
    model: nn.Module
    seconds: float
    out: Path
    state: Path | None
    steps: int | None
    device: torch.device
    begun: float = field(default_factory=time.monotonic)
    curve: list[dict[str, float]] = field(default_factory=list)
    step: int = 0
    seen: int = 0

    @property
    def elapsed(self) -> float:
        """Seconds of the budget that are spent."""
        return time.monotonic() - self.begun

    @property
    def progress(self) -> float:
        """0 to 1, over the part of the budget that is for training; a tenth, 25 s at most, is for evaluation."""
        return min(1.0, self.elapsed / (self.seconds - min(25.0, 0.1 * self.seconds)))


def optimizers(model: nn.Module, recipe: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else, which has no weight decay."""
    inner = [p for name, p in model.named_parameters() if name.startswith("layers.") and name.endswith("proj.weight")]
    ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in ids]
    fused = next(model.parameters()).is_cuda
    other = torch.optim.AdamW(rest, lr=recipe.rate_other, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    return [Muon(inner, lr=recipe.rate, decay=recipe.decay), other]


def train(run: Run, loss_of: Callable[[Phase, torch.Generator], Tensor]) -> None:
    """Steps until the budget is spent, then writes the weights. ``loss_of`` draws a batch of a phase and gives its mean
    loss.
    """
    pair = optimizers(run.model, run.recipe)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in pair]
    _resume(run, pair)
    # A run that goes on draws other batches than those it has had.
    generator = torch.Generator(device=run.device).manual_seed(run.recipe.seed * 1_000_003 + run.step)
    saved, told, late = time.monotonic(), 0.0, None
    run.model.train()
    while run.progress < 1.0 and (run.steps is None or run.step < run.steps):
        phase = next(phase for phase in run.recipe.phases if run.progress <= phase.until)
        factor = min(1.0, (run.step + 1) / _WARM_UP) * (1.0 - run.progress)
        for optimizer, rate in zip(pair, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(phase, generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), _CLIP)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.seen += phase.batch * (phase.size if run.name == "lm" else 1)
        if late is not None:  # the step before: its loss is there without a wait
            value = late[0].item()
            if not math.isfinite(value):
                raise FloatingPointError(f"{run.name}: the loss of step {run.step - 1} is {value}")
            if run.elapsed - told > run.seconds / 80 or run.step < 4:
                told = run.elapsed
                line = {"step": run.step - 1, "seconds": round(told, 2), "size": phase.size, "seen": run.seen,
                        "loss": round(value, 5), "norm": round(late[1].item(), 4),
                        "factor": round(factor, 4)}  # fmt: skip
                run.curve.append(line)
                tell(run, " ".join(f"{key} {value}" for key, value in line.items()))
        late = (loss.detach(), norm.detach())
        if run.state is not None and time.monotonic() - saved > _EVERY:
            saved = time.monotonic()
            checkpoint(run, pair)
    if run.state is not None:
        checkpoint(run, pair)
    run.model.eval()
    save(run.model, run.out, run.name)


def checkpoint(run: Run, pair: list[torch.optim.Optimizer]) -> None:
    """Writes all that ``train`` needs to go on."""
    assert run.state is not None
    whole = run.state.with_suffix(".part")
    torch.save(
        {"model": run.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in pair],
         "step": run.step, "seen": run.seen, "elapsed": run.elapsed, "curve": run.curve},
        whole,
    )  # fmt: skip
    whole.replace(run.state)


def _resume(run: Run, pair: list[torch.optim.Optimizer]) -> None:
    if run.state is None or not run.state.is_file():
        return
    state: dict[str, Any] = torch.load(run.state, map_location=run.device, weights_only=True)
    run.model.load_state_dict(state["model"])
    for optimizer, own in zip(pair, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    run.step, run.seen, run.curve = state["step"], state["seen"], state["curve"]
    run.begun = time.monotonic() - state["elapsed"]
    tell(run, f"goes on at step {run.step}, {state['elapsed']:.1f} s")


def finish(run: Run, evaluation: dict[str, Any]) -> None:
    """Writes the curve and the evaluation as ``NAME.json``; ``train`` has written the weights."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    record = {
        "name": run.name, "parameters": sum(p.numel() for p in run.model.parameters()), "device": device,
        "torch": torch.__version__, "seconds": run.seconds, "elapsed": round(run.elapsed, 1), "steps": run.step,
        "seen": run.seen, "evaluation": evaluation, "curve": run.curve,
    }  # fmt: skip
    (run.out / f"{run.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    tell(run, f"done: {json.dumps(evaluation)}")


def tell(run: Run, text: str) -> None:
    """One line of progress."""
    print(f"{run.name} {run.elapsed:7.1f} s | {text}", flush=True)  # noqa: T201


def compiled(run: Run, layers: Iterator[nn.Module]) -> None:
    """torch.compile for each layer by itself (they share one compilation), on a GPU only. Where it fails, torch warns
    and the layer runs as it is.
    """
    if run.device.type != "cuda":
        return
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.automatic_dynamic_shapes = False
    for layer in layers:
        layer.compile(dynamic=False)
