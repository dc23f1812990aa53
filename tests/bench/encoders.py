"""Speed of U-TAE against a straightforward implementation of the papers: ``python tests/bench/encoders.py``.

One thread, process CPU time, interleaved runs, medians. ``Straightforward`` has the same parameters and results; it
sends padded dates through the convolutions and builds keys and values of every pixel and date, as the equations of
arXiv 2107.07933 and 2007.00586 are usually written down. It is not the official code, which also runs every
convolution block twice to learn a shape; ``--dummy-pass`` adds that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from bocage.ssl.encoders.temporal import SinusoidalPositions
from bocage.ssl.encoders.utae import UTAE, UTAEOutput


class Straightforward(UTAE):
    """The same network, computed the plain way: stride 1, grouped attention, padded dates excluded from ``in_norm``."""

    dummy_pass = False

    def _shared(self, block: nn.Module, maps: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """``block`` on all frames of (B, T, C, H, W) maps, zeros where padded."""
        if self.dummy_pass:
            block(torch.zeros_like(maps.flatten(0, 1)))
        maps = block(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
        return maps.masked_fill(padding[:, :, None, None, None], 0.0)

    def _temporal(self, maps: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder = self.temporal_encoder
        batch, length, channels, height, width = maps.shape
        sequence = maps.permute(0, 3, 4, 1, 2).reshape(-1, length, channels)
        hidden = padding[:, None].expand(batch, height * width, length).reshape(-1, length)
        if padding.any():
            groups = sequence.unflatten(2, (encoder.n_head, -1))
            weight = (~hidden)[:, :, None, None].to(groups.dtype)
            count = weight.sum(dim=1, keepdim=True) * groups.shape[-1]
            mean = (groups * weight).sum(dim=(1, 3), keepdim=True) / count
            variance = ((groups - mean).square() * weight).sum(dim=(1, 3), keepdim=True) / count
            sequence = ((groups - mean) * (variance + encoder.in_norm.eps).rsqrt()).flatten(2)
            sequence = sequence * encoder.in_norm.weight + encoder.in_norm.bias
        else:
            sequence = encoder.in_norm(sequence.mT).mT
        tokens = encoder.inconv(sequence.mT).mT
        positions = SinusoidalPositions(tokens.shape[-1] // encoder.n_head)(dates.flatten())
        positions = positions.repeat(1, encoder.n_head).unflatten(0, (batch, length))
        tokens = tokens + positions.repeat_interleave(height * width, dim=0)
        heads = encoder.attention_heads
        keys = heads.fc1_k(tokens).unflatten(2, heads.Q.shape)
        scores = (keys * heads.Q).sum(dim=-1).mT / heads.Q.shape[1] ** 0.5
        attention = scores.masked_fill(hidden[:, None], -1e3).softmax(dim=-1)
        attention = encoder.attention_dropout(attention)
        values = tokens.unflatten(2, (encoder.n_head, -1)).transpose(1, 2)
        pooled = (attention[:, :, None] @ values).flatten(1)
        embedding = encoder.out_norm(encoder.dropout(encoder.mlp(pooled)))
        attention = attention.unflatten(0, (batch, height, width)).permute(0, 4, 3, 1, 2)
        return embedding.view(batch, height, width, -1).permute(0, 3, 1, 2), attention

    def encode(self, values: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor | None = None) -> UTAEOutput:
        """See ``UTAE.encode``."""
        if padding is None:
            padding = torch.zeros(values.shape[:2], dtype=torch.bool)
        skips = [self._shared(self.in_conv, values, padding)]
        for block in self.down_blocks:
            skips.append(self._shared(block, skips[-1], padding))
        embedding, attention = self._temporal(skips.pop(), dates, padding)
        attention = attention.masked_fill(padding[:, :, None, None, None], 0.0)
        maps = [embedding]
        for block, skip in zip(self.up_blocks, reversed(skips)):
            grouped = skip.unflatten(2, (self.temporal_encoder.n_head, -1))
            pooled = (grouped * attention[:, :, :, None]).sum(dim=1).flatten(1, 2)
            maps.append(block(maps[-1], pooled))
        return UTAEOutput(maps, None)


def interleaved(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median process CPU time of each run, seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dates", type=int, default=40)
    parser.add_argument("--dummy-pass", action="store_true", help="run every convolution block twice, as the official")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Straightforward.dummy_pass = arguments.dummy_pass
    ours = UTAE(10)
    plain = Straightforward(10)
    plain.load_state_dict(ours.state_dict())
    batch, length = arguments.batch, arguments.dates
    values = torch.randn(batch, length, 10, 10, 10)
    dates = torch.arange(length).float().mul(365 / length).expand(batch, -1)
    ragged = torch.arange(length) >= torch.linspace(0.5 * length, length, batch).long()[:, None]
    kept_40 = torch.rand(batch, length).argsort(dim=1) >= 0.4 * length
    kept_25 = torch.rand(batch, length).argsort(dim=1) >= 0.25 * length
    print(f"batch {batch}, {length} dates, 10 x 10 px, 1 thread, median CPU ms of {arguments.repeats}")
    print(f"{'case':<28}{'pass':<18}{'plain':>8}{'ours':>8}{'ratio':>7}{'difference':>12}")
    for case, padding in (
        ("no padding", None),
        ("padded, 50-100 % valid", ragged),
        ("40 % of dates kept", kept_40),
        ("25 % of dates kept", kept_25),
    ):
        plain.load_state_dict(ours.state_dict())  # running statistics of the runs before, in another order of sums
        ours.eval(), plain.eval()
        with torch.no_grad():
            pairs = zip(ours(values, dates, padding), plain(values, dates, padding))
            difference = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
        ours.train(), plain.train()
        for name, backward in (("forward", False), ("forward+backward", True)):

            def run(model: UTAE, backward: bool = backward, padding: torch.Tensor | None = padding) -> None:
                with torch.set_grad_enabled(backward):
                    loss = sum(maps.square().mean() for maps in model(values, dates, padding))
                if backward:
                    model.zero_grad()
                    loss.backward()

            medians = interleaved({"plain": lambda: run(plain), "ours": lambda: run(ours)}, arguments.repeats)
            ratio = medians["plain"] / medians["ours"]
            print(
                f"{case:<28}{name:<18}{1e3 * medians['plain']:>8.1f}{1e3 * medians['ours']:>8.1f}{ratio:>7.2f}"
                f"{difference:>12.1e}"
            )


if __name__ == "__main__":
    main()
