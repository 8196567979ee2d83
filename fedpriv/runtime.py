"""What a config says of where and how a run is carried out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpriv.sections import NO_BEARING, Positive, Section


class RuntimeConfig(Section):
    """Where and how the run is carried out."""

    grid: Annotated[Literal["ray", "local"], NO_BEARING] = Field(
        default="ray",
        description="ray: each node is a Ray actor; local: nodes answer one after another in this "
        "process. The results are the same. A deployment has Flower's own grid.",
    )
    workers: Annotated[int, Field(ge=1), NO_BEARING] = Field(
        default=2, description="Simulated nodes."
    )
    threads_per_worker: Annotated[int, Field(ge=1), NO_BEARING] = Field(
        default=1, description="Torch threads each."
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), NO_BEARING] = Field(
        default="auto", description="auto, cpu, cuda or cuda:n."
    )
    gpus_per_worker: Annotated[float, Field(ge=0), NO_BEARING] = Field(
        default=0.0, description="Ray GPU share of a worker; 0.25 puts four workers on one GPU."
    )
    engine: Literal["stacked", "sequential"] = Field(
        default="stacked",
        description="stacked: many users in one forward and backward pass, where the model "
        "allows it (the run says so), and on a GPU nothing is dropped; sequential: one user after "
        "another. Equal up to rounding. A deployment is always sequential.",
    )
    stack: Annotated[int, Field(ge=1)] | Literal["measure"] | None = Field(
        default=None,
        description="stacked: users at once; null: chosen by the size of model and examples, the "
        "same in every run; measure: the fastest of a short trial at the start, written into the "
        "run's config, since the rounding of sums depends on it.",
    )
    stack_mib: Annotated[int, Field(ge=1), NO_BEARING] = Field(
        default=1024,
        description="stacked: memory for parameters and gradients of the users of a stack (MiB), "
        "which limits the number that is chosen.",
    )
    fast_products: bool = Field(
        default=False,
        description="On CPUs: multiply float32 matrices with oneDNN, where a check of the model's "
        "products at the start finds that it keeps float32's exactness. Some CPUs without bfloat16 "
        "units are faster so; results are equal up to rounding.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="On GPUs: record the training of a stack whose shapes come again, and replay "
        "it, where users take equally many steps and nothing is drawn in the forward pass.",
    )
    cache_mib: Annotated[int, Field(ge=0), NO_BEARING] = Field(
        default=1024,
        description="Memory in which a worker keeps prepared users (MiB); 0 keeps none.",
    )
    ray_address: Annotated[str | None, NO_BEARING] = Field(
        default=None, description="An existing Ray cluster to join; null starts a private one."
    )
    profile: Annotated[bool, NO_BEARING] = Field(
        default=False,
        description="Record where the time goes: a table at the end, and trace.json for a trace "
        "viewer. The same as fedpriv run --profile.",
    )
    round_timeout: Annotated[Positive, NO_BEARING] = Field(
        default=3600.0,
        description="Seconds to wait for nodes in a round; a late node is a dropout.",
    )
    join_timeout: Annotated[Positive, NO_BEARING] = Field(
        default=60.0,
        description="Deployment: seconds to wait for nodes to come, at the start for all of "
        "`workers`, later for node_share of them.",
    )
    node_share: Annotated[float, Field(ge=0, le=1), NO_BEARING] = Field(
        default=0.5,
        description="Deployment: the smallest share of the nodes (`workers`) whose sums make a "
        "round. With fewer it is lost: it releases nothing and is tried again. Noise that nodes, "
        "users or silos have added in it is charged all the same.",
    )
    retries: Annotated[int, Field(ge=0), NO_BEARING] = Field(
        default=3,
        description="Deployment: how often a round that was lost is tried again, before the run "
        "stops and can be resumed.",
    )
    deployment: bool = Field(
        default=False,
        description="Nodes host users of their own, and sampling and noise are seeded from the "
        "operating system instead of `seed`. A run over nodes that are not what this says is "
        "refused, by its server and by real nodes.",
    )

    @model_validator(mode="after")
    def _gpus_are_rays_to_give(self) -> RuntimeConfig:
        share = self.gpus_per_worker
        if share > 1 and share != int(share):
            raise ValueError(f"gpus_per_worker: above 1 only whole GPUs can be given, got {share}")
        if share and self.device.startswith("cuda:"):
            raise ValueError(
                "device: with gpus_per_worker a worker sees no GPU but its own, got "
                f"{self.device}; write cuda"
            )
        if self.grid == "local" and (share or self.ray_address):
            key = "gpus_per_worker" if share else "ray_address"
            raise ValueError(f"{key}: belongs to Ray, and grid: local does without; write one")
        return self
