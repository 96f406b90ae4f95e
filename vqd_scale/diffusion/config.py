"""Configuration of noise schedules, objective and sampling, and registry of their kinds; needs no torch."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vqd_scale.core.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from vqd_scale.diffusion.sampling_plan import Sampler
    from vqd_scale.diffusion.schedule import TransitionProbabilities


class Released(Config):
    """Noise schedule of the public checkpoints: almost mask-only, ``replace`` is 1e-6 at every time.

    Source: the code released with VQ-Diffusion; the paper describes `Paper` instead.
    """

    kind: Literal["released"] = "released"
    steps: int = Field(default=100, ge=2, le=1 << 16)
    """T, the number of timesteps."""
    keep_first: float = Field(default=0.99999, gt=0, lt=1)
    """Probability that a token is still clean after the first timestep. Needed to load checkpoints trained
    with other rates, as are the next three keys."""
    keep_last: float = Field(default=0.000009, gt=0, lt=1)
    """Probability that a token is still clean after the last timestep."""
    mask_first: float = Field(default=0.000009, gt=0, lt=1)
    """Probability that a token is masked after the first timestep."""
    mask_last: float = Field(default=0.99999, gt=0, lt=1)
    """Probability that a token is masked after the last timestep."""

    @model_validator(mode="after")
    def _rates_are_a_chain(self) -> Self:
        if self.keep_first + self.mask_first > 1 or self.keep_last + self.mask_last > 1:
            raise ValueError("keep and mask exceed 1 together; lower one of them")
        if self.keep_last >= self.keep_first or self.mask_last <= self.mask_first:
            raise ValueError("keep must fall and mask must rise from the first step to the last")
        return self

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T; the reference code starts from masks only."""
        return 1.0

    def cumulative(self) -> "TransitionProbabilities":
        """Return the probabilities from the clean image to each t, shape [steps]; linear in t."""
        import torch

        from vqd_scale.diffusion.schedule import TransitionProbabilities

        fraction = torch.arange(self.steps, dtype=torch.float64) / (self.steps - 1)
        keep = self.keep_first + fraction * (self.keep_last - self.keep_first)
        mask = self.mask_first + fraction * (self.mask_last - self.mask_first)
        return TransitionProbabilities(keep, 1 - keep - mask, mask)


class Paper(Config):
    """Noise schedule of the VQ-Diffusion paper: mask 0 → ``mask_rate``, replace 0 → 1 - ``mask_rate``.

    ``mask_rate`` 1 is mask-only, 0 is replace-only: the paper's ablation (arXiv 2111.14822).
    """

    kind: Literal["paper"] = "paper"
    steps: int = Field(default=100, ge=1, le=1 << 16)
    """T, the number of timesteps."""
    mask_rate: float = Field(default=0.9, ge=0, le=1)
    """Masked fraction of x_T; the other tokens of x_T are uniformly random. 1 or 0 reproduces the paper's
    ablation."""

    @property
    def replace_rate(self) -> float:
        """Probability of resampling at the last time."""
        return 1 - self.mask_rate

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T."""
        return self.mask_rate

    def cumulative(self) -> "TransitionProbabilities":
        """Return the probabilities from the clean image to each t, shape [steps]."""
        import torch

        from vqd_scale.diffusion.schedule import TransitionProbabilities

        noise = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        return TransitionProbabilities(1 - noise, self.replace_rate * noise, self.mask_rate * noise)


class UniformCosine(Config):
    """Noise schedule of VQ-DDM: replacement only, along a squared cosine.

    Each step keeps a code with the square root of the squared cosine's ratio. ``offset`` keeps the first
    steps from being too small; ``min_ratio`` bounds the last one.
    Source: the code of VQ-DDM (arXiv 2112.01799), after Hoogeboom et al., arXiv 2102.05379.
    """

    kind: Literal["uniform_cosine"] = "uniform_cosine"
    steps: int = Field(default=4000, ge=1, le=1 << 16)
    """T, the number of timesteps."""
    offset: float = Field(default=0.008, gt=0)
    """Shift of the cosine, as a fraction of T, so that the first timesteps do not add too little noise.
    Needed to load models trained with another shift."""
    min_ratio: float = Field(default=0.001, gt=0, lt=1)
    """Lower bound of the ratio of the squared cosine at two consecutive timesteps; it takes effect at the
    last one. Needed to load models trained with another bound."""

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T."""
        return 0.0

    def cumulative(self) -> "TransitionProbabilities":
        """Return the probabilities from the clean image to each t, shape [steps]."""
        import torch

        from vqd_scale.diffusion.schedule import TransitionProbabilities

        fraction = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        cosine = torch.cos((fraction + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        ratio = (cosine[1:] / cosine[:-1]).clamp(self.min_ratio, 1)
        log_keep = 0.5 * ratio.log().cumsum(0)
        return TransitionProbabilities(log_keep.exp(), -torch.expm1(log_keep), torch.zeros_like(log_keep))


class Absorbing(Config):
    """Mask-only noise schedule, linear from 0 to 1: MaskGIT and MDLM in this formulation.

    Source: the absorbing state of D3PM (arXiv 2107.03006).
    """

    kind: Literal["absorbing"] = "absorbing"
    steps: int = Field(default=100, ge=1, le=1 << 16)
    """T, the number of timesteps."""

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T."""
        return 1.0

    def cumulative(self) -> "TransitionProbabilities":
        """Return the probabilities from the clean image to each t, shape [steps]."""
        return Paper(steps=self.steps, mask_rate=1).cumulative()


Schedule = Annotated[Released | Paper | UniformCosine | Absorbing, Field(discriminator="kind")]


class Uniform(Config):
    """Uniform timestep sampling."""

    kind: Literal["uniform"] = "uniform"


class Importance(Config):
    """Importance sampling of VQ-Diffusion: p(t) ∝ sqrt(running mean of squared losses).

    Uniform until every time has been observed more than ``warmup`` times.
    """

    kind: Literal["importance"] = "importance"
    warmup: int = Field(default=10, ge=0)
    """Sampling is uniform until every timestep has more than this number of observed losses. Lower it for
    short runs with many timesteps."""
    decay: float = Field(default=0.9, gt=0, lt=1)
    """Decay of the running mean of squared losses per observation. Raise it if p(t) fluctuates at small batch
    sizes."""


Times = Annotated[Uniform | Importance, Field(discriminator="kind")]


class ObjectiveConfig(Config):
    """Weights of the objective's terms."""

    auxiliary_weight: float = Field(default=0.0005, ge=0)
    """Weight of the cross-entropy of x_0 (VQ-Diffusion: 5e-4 for text, 1e-3 for classes)."""
    adaptive_auxiliary: bool = True
    """Multiply the auxiliary weight by ``2 - t / T``, as in the released code."""
    mask_weight: float = Field(default=1.0, ge=0)
    """Weight of the KL of masked tokens; the decoder term at t = 0 has weight 1. Needed to reproduce
    configurations of the released code whose ``mask_weight`` is not [1, 1]."""
    visible_weight: float = Field(default=1.0, ge=0)
    """Weight of the KL of visible tokens, the other number of ``mask_weight`` in the released code."""
    check_values: bool = False
    """Check tokens, times and losses of every batch. Set it to find the first invalid batch; it synchronizes
    with the device in each step."""


class ConstantGuidance(Config):
    """Guidance with the same scale at every time.

    Scale 1 is the conditional prediction, 0 the unconditional one. The convention is that of the released
    code; the scale s of the Improved VQ-Diffusion paper is smaller by 1.
    """

    kind: Literal["constant"] = "constant"
    scale: float = Field(default=3.0, ge=0, le=1000)
    """Guidance scale; 1 disables guidance."""

    def at(self, t: int) -> float:
        """Return the guidance scale at time ``t``."""
        return self.scale


class Linear(Config):
    """Guidance scale linear in time: ``clean`` at t = 0, ``noisy`` at t >= ``noisy_time``."""

    kind: Literal["linear"] = "linear"
    noisy: float = Field(default=1.0, ge=0, le=1000)
    """Guidance scale at ``noisy_time`` and at noisier times."""
    clean: float = Field(default=3.0, ge=0, le=1000)
    """Guidance scale at t = 0. Raise it to follow the caption more closely in details."""
    noisy_time: int = Field(default=99, ge=1)
    """Time from which the scale is ``noisy``; T - 1 for a ramp over all timesteps."""

    def at(self, t: int) -> float:
        """Return the guidance scale at time ``t``."""
        return self.clean + (self.noisy - self.clean) * min(t / self.noisy_time, 1.0)


class IntervalGuidance(Config):
    """Guidance limited to times ``first`` down to ``last`` (Kynkäänniemi et al., arXiv 2404.07724).

    The scale is 1 at all other times.
    """

    kind: Literal["interval"] = "interval"
    scale: float = Field(default=3.0, ge=0, le=1000)
    """Guidance scale within the interval."""
    first: int = Field(default=80, ge=0)
    """Noisiest guided time."""
    last: int = Field(default=20, ge=0)
    """Cleanest guided time; 0 guides to the end of sampling."""

    @model_validator(mode="after")
    def _first_comes_first(self) -> Self:
        if self.last > self.first:
            raise ValueError(
                f"last is {self.last}, first is {self.first}; sampling goes from first down to last"
            )
        return self

    def at(self, t: int) -> float:
        """Return the guidance scale at time ``t``."""
        return self.scale if self.last <= t <= self.first else 1.0


GuidanceScale = Annotated[ConstantGuidance | Linear | IntervalGuidance, Field(discriminator="kind")]


class TopP(Config):
    """Top-p truncation: the most likely codes with total probability ``p`` (the reference's "0.86r")."""

    kind: Literal["top_p"] = "top_p"
    p: float = Field(default=0.86, ge=0, le=1)
    """Total probability of the codes that may be sampled; 1 disables truncation."""

    def apply(self, log_p: "Tensor") -> "Tensor":
        """Set log p [batch, length, codes] of the dropped codes to -inf."""
        from vqd_scale.diffusion.truncation import keep_top_p

        return keep_top_p(log_p, self.p)


class TopK(Config):
    """Top-k truncation: the ``k`` most likely codes."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=100, ge=1)
    """Number of codes that may be sampled."""

    def apply(self, log_p: "Tensor") -> "Tensor":
        """Set log p [batch, length, codes] of the dropped codes to -inf."""
        from vqd_scale.diffusion.truncation import keep_top_k

        return keep_top_k(log_p, self.k)


Truncation = Annotated[TopP | TopK, Field(discriminator="kind")]


class SamplerSteps(Config):
    """Base of the samplers with a configurable number of steps."""

    steps: int = Field(default=25, ge=1)
    """Number of sampling steps, each one forward pass; at most the schedule's number of steps."""


class Ancestral(Config):
    """Ancestral sampling with all T steps."""

    kind: Literal["ancestral"] = "ancestral"

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.samplers import AncestralSampler

        return AncestralSampler()


class Strided(SamplerSteps):
    """Sampling with 1 to T steps, each from the exact posterior over its stride.

    Source: the fast inference of the VQ-Diffusion paper. Unlike `LegacyFast` and `LegacyDiffusers`, the
    sampler follows the noise schedule.
    """

    kind: Literal["strided"] = "strided"

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.samplers import StridedSampler

        return StridedSampler(self)


class LegacyFast(Config):
    """Fast sampling of the released code, for comparison only.

    The network receives t, but the posterior undoes one step at the earlier time t - (speed - 1). With speed
    4 a quarter of the tokens is still masked before the last step; use `Strided` instead.
    """

    kind: Literal["legacy_fast"] = "legacy_fast"
    speed: int = Field(default=4, ge=2)
    """Timesteps per forward pass. Needed to reproduce the released code's fast inference."""

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.samplers import LegacyFastSampler

        return LegacyFastSampler(self)


class LegacyDiffusers(Config):
    """Fewer steps as in diffusers' VQDiffusionScheduler (the last times only), for comparison only.

    Sampling starts from masks only, at a time when most tokens should be visible; use `Strided` instead.
    """

    kind: Literal["legacy_diffusers"] = "legacy_diffusers"
    steps: int = Field(default=100, ge=1)
    """Number of sampling steps, each one forward pass; at most T."""

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.samplers import LegacyDiffusersSampler

        return LegacyDiffusersSampler(self)


class Purity(SamplerSteps):
    """Purity sampling of Improved VQ-Diffusion: unmask confident positions, with sharpened codes.

    Positions are sampled in proportion to their purity max_k p_k, codes from p ** (1 + weight * purity), with
    purity relative to the image's maximum (arXiv 2205.16007, eq. 11, with the factor of its code).
    """

    kind: Literal["purity"] = "purity"
    weight: float = Field(default=1.0, ge=0)
    """Strength of the sharpening; 0 samples codes from the predicted distribution."""

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.unmasking import PuritySampler

        return PuritySampler(self)


class Confidence(SamplerSteps):
    """MaskGIT sampling (arXiv 2202.04200): sample every code, keep the most confident ones.

    ``temperature`` times the remaining masked fraction scales the Gumbel noise on the confidence.
    """

    kind: Literal["confidence"] = "confidence"
    temperature: float = Field(default=4.5, ge=0)
    """Scale of the Gumbel noise on the confidence, as a multiple of the remaining masked fraction. Raise it
    for more diverse images."""

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.unmasking import ConfidenceSampler

        return ConfidenceSampler(self)


class Halton(SamplerSteps):
    """Unmasking in Halton order, which covers a square image evenly (Besnier et al., arXiv 2503.17076)."""

    kind: Literal["halton"] = "halton"

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.unmasking import HaltonSampler

        return HaltonSampler(self)


class Remask(SamplerSteps):
    """Remasking: visible tokens may be masked again and resampled, to correct early mistakes.

    The masked fraction follows the schedule. ``strength`` is the fraction of the largest possible remasking
    probability (ReMDM, arXiv 2503.00307, its "rescale" schedule).
    """

    kind: Literal["remask"] = "remask"
    strength: float = Field(default=0.1, ge=0, le=1)
    """Probability of remasking, as a fraction of the largest possible one. Raise it for more corrections,
    which need more steps."""

    def build(self) -> "Sampler":
        """Return the sampler."""
        from vqd_scale.diffusion.unmasking import RemaskSampler

        return RemaskSampler(self)


SamplerConfig = Annotated[
    Ancestral | Strided | Purity | Confidence | Halton | Remask | LegacyFast | LegacyDiffusers,
    Field(discriminator="kind"),
]
"""Samplers by kind; a new sampler is one class here, whose `build` returns the `Sampler`."""
