"""From prompts to pictures with a trained model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from vqd_scale.diffusion.guidance import Constant, Predict, TopP, guided_pair, truncated
from vqd_scale.diffusion.sampler import Sampler, Strided, sample
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.inference.bundle import Bundle, load_bundle
from vqd_scale.tokenizers.base import to_bytes


class TextToImage:
    """Prompts to pictures.

    >>> pipe = TextToImage.load(Path("runs/demo/model"))  # doctest: +SKIP
    >>> pipe(["a red circle on white"], steps=25, guidance=2.0)[0].save("circle.png")  # doctest: +SKIP

    Args:
        bundle: A loaded model.
        device: Where it lies.
    """

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self.bundle = bundle
        self.device = device
        self.transition = MaskAndReplace(bundle.config.diffusion, bundle.config.codes)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str | None = None) -> "TextToImage":
        """Load a bundle, or the one that a finished run exported.

        Args:
            path: The folder of a bundle or of a run.
            device: A GPU if there is one, unless told otherwise.

        Raises:
            UserError: There is no bundle, or a file of it is damaged.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(load_bundle(Path(path), chosen), chosen)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 25,
        guidance: float = 3.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt.

        Args:
            prompts: Captions.
            steps: Network evaluations, 1 to the schedule's T (exact strided posterior).
            guidance: Scale of classifier-free guidance; 1 is none.
            top_p: Share of the probability that each prediction keeps (0.86 is the papers' 0.86r).
            seed: Picture i of a seed is the same in whatever batch.

        Raises:
            UserError: ``steps`` does not fit the schedule.
        """
        slots = torch.arange(len(prompts), device=self.device)
        images = self.draw(
            prompts, slots, Strided(steps=steps), guidance=Constant(scale=guidance), top_p=top_p, seed=seed
        )
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        slots: Int[Tensor, " batch"],
        sampler: Sampler,
        *,
        guidance: Constant,
        top_p: float,
        seed: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """Draw one picture for each prompt, as a tensor on the CPU.

        Args:
            prompts: Captions.
            slots: int64, each picture's own number, which names its random numbers.
            sampler: Which steps are taken.
            guidance: Scale of classifier-free guidance.
            top_p: Share of the probability that each prediction keeps.
            seed: Names the random numbers, too.
            on_step: Called after each step with the number of steps done and of all.

        Raises:
            UserError: The sampler does not fit the schedule.
        """
        rows, columns = self.bundle.config.grid
        predict = guided_pair(*self._predictions(prompts), guidance)
        if top_p < 1:
            predict = truncated(predict, TopP(rate=top_p))
        slots = slots.to(self.device)
        tokens = sample(predict, sampler, self.transition, slots, rows * columns, seed, on_step=on_step)
        return to_bytes(self.bundle.tokenizer.decode(tokens.unflatten(1, (rows, columns)))).cpu()

    def _predictions(
        self, prompts: Sequence[str]
    ) -> tuple[Predict, Callable[[Tensor, int], tuple[Tensor, Tensor]]]:
        """Log p(x0 | x_t, prompt), and both that and log p(x0 | x_t) from one pass over twice the batch."""
        model = self.bundle.model
        ids = torch.from_numpy(model.text.tokenizer(prompts)).to(self.device)
        given = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        both = model.text(torch.cat([ids, ids]), torch.cat([given, ~given]))

        def evaluate(tokens: Tensor, t: int, text: Tensor) -> Float[Tensor, "batch length codes"]:
            times = torch.full((len(tokens),), t, device=self.device)
            return model.denoiser(tokens, times, text).float().log_softmax(dim=-1)

        def conditional(tokens: Tensor, t: int) -> Tensor:
            return evaluate(tokens, t, both[: len(prompts)])

        def pair(tokens: Tensor, t: int) -> tuple[Tensor, Tensor]:
            with_prompt, without = evaluate(torch.cat([tokens, tokens]), t, both).chunk(2)
            return with_prompt, without

        return conditional, pair
