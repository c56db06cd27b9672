"""Adam with the interface of apex's FusedAdam, for machines without apex or Transformer Engine.

Megatron's distributed optimizer can load its state only if the step count stands in the parameter
group and the state holds nothing but the two moments, as apex keeps them; torch's own Adam keeps a
step for each parameter and fails on resume.
"""

from collections.abc import Callable

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """Adam, or AdamW when `adam_w_mode`; `group["step"]` counts steps.

    State of a parameter: `exp_avg` and `exp_avg_sq`, of its shape and dtype. Gradients are divided
    by `divisor` where they are read, and stay so.
    """

    divisor = 1.0

    def __init__(
        self,
        params: list[dict],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,  # apex's, too; Megatron-Core passes it from 0.17 on
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay is supported")
        if capturable:
            raise ValueError("steps cannot be captured in a CUDA graph")
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue  # torch has no kernel for none
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            states = [self.state[p] for p in parameters]
            # torch's kernel raises the count by one before it uses it.
            count = float(group["step"] - 1)
            scale = None if self.divisor == 1 else torch.tensor(self.divisor)
            adamw(
                parameters,
                [p.grad for p in parameters],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [torch.tensor(count) for _ in parameters],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                fused=True,
                grad_scale=scale,
            )
