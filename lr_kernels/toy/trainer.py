"""One training process: its steps, its learning rate, and the average of the weights of all processes."""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from tqdm import tqdm

WARMUP_STEPS = 150
AVERAGING_SECONDS = 8


@dataclass(frozen=True)
class Run:
    """What every training process is told; rank 0 also logs and saves."""

    minutes: float
    seed: int
    rank: int
    ranks: int
    samples: Path | None
    resume: bool

    @property
    def leads(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0


@dataclass
class Trainer:
    """AdamW on every rank, weights averaged over ranks and over time, and a schedule over wall-clock time."""

    run: Run
    modules: list
    learning_rate: float
    ema_decay: float
    weight_decay: float = 1e-4
    step: int = 0
    fraction: float = 0.0
    steps_of_all_ranks: int = 0
    losses: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.learning_rate, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
        )
        self.averaged = [copy.deepcopy(module).eval() for module in self.modules]
        self.average = [p for module in self.averaged for p in module.parameters() if p.requires_grad]
        torch.distributed.barrier()
        self.started = time.time()
        self.next_average = AVERAGING_SECONDS
        self.progress = tqdm(total=round(self.run.minutes * 60), unit="s", disable=not self.run.leads, mininterval=15)

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.time() - self.started

    @property
    def running(self) -> bool:
        """Whether there is time left."""
        return self.fraction < 1

    def schedule(self) -> float:
        """Learning rate: warm-up, constant for 40 % of the time, then a cosine down to 3 %."""
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, self.fraction - 0.4) / 0.6))
        return self.learning_rate * min(1, (self.step + 1) / WARMUP_STEPS) * (0.03 + 0.97 * decay)

    def average_over_ranks(self) -> None:
        """Average the weights over all ranks at fixed times, so that no rank waits for another in between."""
        while self.seconds >= self.next_average <= 60 * self.run.minutes:
            flat = torch.cat([p.data.flatten() for p in self.parameters] + [torch.tensor([float(self.step)])])
            torch.distributed.all_reduce(flat)
            self.steps_of_all_ranks = round(flat[-1].item())
            flat /= self.run.ranks
            offset = 0
            for parameter in self.parameters:
                parameter.data.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
            self.next_average += AVERAGING_SECONDS

    def update(self, loss: Tensor) -> None:
        """One optimizer step from this rank's loss, a scalar tensor."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule()
        self.optimizer.step()
        self.average_over_ranks()
        self.fraction = min(1.0, self.seconds / (60 * self.run.minutes))
        self.losses.append(loss.item())
        self.step += 1
        decay = min(self.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.data for p in self.parameters], 1 - decay)
        self.progress.update(min(self.progress.total, int(self.seconds)) - self.progress.n)
        if self.step % 100 == 0:
            self.progress.set_postfix(step=self.step, loss=f"{self.recent_loss(100):.4f}", refresh=False)

    def recent_loss(self, window: int = 400) -> float:
        """The mean over the last updates."""
        return float(np.mean(self.losses[-window:]))

    def facts(self, batch: int) -> dict[str, object]:
        """What the manifest says about this training; batch is the number of samples per rank and step."""
        return {
            "seed": self.run.seed,
            "steps": self.step,
            "samples": self.steps_of_all_ranks * batch,
            "minutes": round(self.seconds / 60, 2),
            "threads": self.run.ranks,
            "learning_rate": self.learning_rate,
            "loss": round(self.recent_loss(), 5),
            "parameters": sum(p.numel() for p in self.parameters),
        }
