"""``reduce_codebook``: code counts, removal of unused codes from a tokenizer, remapping of token shards."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vqd_scale.cli.base import Tool, location_from
from vqd_scale.cli.run import check_bundles, check_datasets
from vqd_scale.core.atomic_io import Location, check_file, publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import check_output
from vqd_scale.tokenizers.config import Unused

main = Tool(
    "Remove codes that a dataset does not use: count them, reduce the tokenizer, remap the token shards.",
    "python tools/reduce_codebook.py count --help",
)
"""Entry point of ``tools/reduce_codebook.py``."""

Tokens = Annotated[
    Location,
    typer.Argument(parser=location_from, metavar="TOKENS", help="folder of token shards, or s3://bucket/key"),
]


@main.command("python tools/reduce_codebook.py count runs/coco/tokens runs/coco/counts.json")
def count(
    tokens: Tokens, output: Annotated[Path, typer.Argument(metavar="COUNTS.json", help="file to write")]
) -> None:
    """Count how often each code occurs in token shards."""
    check_datasets(tokens)
    check_file(output)

    from vqd_scale.data.shards.shard_index import ShardSet
    from vqd_scale.preparation.reduce_tokens import count_codes
    from vqd_scale.preparation.tokenize_shards import TokenSetMeta
    from vqd_scale.tokenizers.codebook.usage import usage_of

    encoder, counts = TokenSetMeta.of(ShardSet.open(tokens)).tokenizer, count_codes(tokens)
    usage = usage_of(counts)
    publish_json(output, {"tokenizer": encoder, **asdict(usage), "counts": counts.tolist()})
    print(
        f"{output}: {usage.used:.1%} of {usage.codes:,} codes occur, {usage.used_often:.1%} ten times and "
        f"more; perplexity {usage.perplexity:.0f}"
    )


@main.command(
    "python tools/reduce_codebook.py reduce runs/tokenizers/f8-8192 runs/tokenizers/f8-coco "
    "--counts runs/coco/counts.json"
)
def reduce(
    tokenizer: Annotated[Path, typer.Argument(metavar="BUNDLE", help="tokenizer with all its codes")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="bundle to write")],
    counts: Annotated[Path | None, typer.Option(help="file that 'count' wrote")] = None,
    code_map: Annotated[
        Path | None, typer.Option("--map", help="a published map: one tensor, .safetensors or .pt")
    ] = None,
    min_count: Annotated[int, typer.Option(min=1, help="codes that occur less often are unused")] = 1,
    unused: Annotated[
        Unused,
        typer.Option(
            help="new id of unused codes: 0 for all of them, as in the published models, or that of the "
            "nearest used code"
        ),
    ] = "bucket",
) -> None:
    """Write the bundle of a tokenizer that has only the codes that occur."""
    check_bundles(tokenizer)
    source = counts or code_map
    if source is None or (counts is not None and code_map is not None):
        raise UserError("--counts and --map: give exactly one of them.")
    check_output(output, "reduce_codebook.py reduce")

    from vqd_scale.preparation.reduce_tokens import read_counts, reduce_by_map, reduce_tokenizer
    from vqd_scale.tokenizers.codebook.reduction import read_map

    if counts is None:
        reduced = reduce_by_map(tokenizer, output, read_map(source))
    else:
        reduced = reduce_tokenizer(tokenizer, output, read_counts(counts, tokenizer), min_count, unused)
    print(f"{output}: {reduced.codes:,} of {reduced.full.codes:,} codes")


@main.command(
    "python tools/reduce_codebook.py remap runs/coco/tokens runs/coco/tokens-reduced "
    "--tokenizer runs/tokenizers/f8-8192 --reduced runs/tokenizers/f8-coco"
)
def remap(
    tokens: Tokens,
    output: Annotated[
        Location,
        typer.Argument(parser=location_from, metavar="OUTPUT", help="folder to write, or s3://bucket/key"),
    ],
    tokenizer: Annotated[Path, typer.Option(help="bundle of the tokenizer that encoded the shards")],
    reduced: Annotated[Path, typer.Option(help="bundle that 'reduce' wrote")],
) -> None:
    """Write token shards with the codes of a reduced tokenizer; no image is encoded again."""
    check_datasets(tokens)
    check_bundles(tokenizer, reduced)

    from vqd_scale.preparation.reduce_tokens import remap_shards

    shards = remap_shards(tokens, output, tokenizer, reduced)
    print(f"{output}: {shards.count:,} samples of tokens in {len(shards.shards)} shards")
