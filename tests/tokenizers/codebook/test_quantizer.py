import pytest
import torch

from vqd_scale.tokenizers.codebook import quantizer as module
from vqd_scale.tokenizers.codebook.quantizer import Codebook, chunks, nearest_codes


def filled(codes: int = 6, width: int = 3, decay: float = 0.9) -> Codebook:
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(codes, width, decay, reset_fraction=0.1)
    codebook.embedding.copy_(torch.randn(codes, width, generator=generator))
    codebook.cluster_size.copy_(torch.rand(codes, generator=generator) + 1)
    codebook.embedding_avg.copy_(codebook.embedding * codebook.cluster_size[:, None])
    return codebook


def vectors(count: int = 50, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def test_nearest_is_the_smallest_distance() -> None:
    codebook, points = filled(), vectors()
    distances = (points[:, None] - codebook.embedding[None]).square().sum(-1)
    assert torch.equal(codebook.nearest(points), distances.argmin(1))


def test_chunked_search_is_equal_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, points = filled(), vectors()
    expected_codes = codebook.nearest(points)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * codebook.codes)
    parts = chunks(points, codebook.codes)
    assert [len(part) for part in parts] == [4] * 12 + [2]
    assert torch.equal(codebook.nearest(points), expected_codes)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    assert torch.equal(codebook.nearest(points), expected_codes)


def test_search_is_float32_under_autocast() -> None:
    """Codes 0.003 apart near 1 are equal in bfloat16."""
    codes = 1 + torch.arange(8.0)[:, None].expand(8, 2) * 3e-3
    with torch.autocast("cpu", torch.bfloat16):
        codes_found = nearest_codes(codes.clone(), codes)
    assert codes_found.tolist() == list(range(8))
    assert codes.bfloat16().unique().numel() < 8


def test_update_moves_each_code_to_the_average_of_its_vectors() -> None:
    codebook, points = filled(decay=0.75), vectors()
    before_size, before_avg = codebook.cluster_size.clone(), codebook.embedding_avg.clone()
    ids = codebook.nearest(points)
    codebook.update(points, ids, torch.ones(len(ids)), lambda tensor: tensor)
    for code in range(codebook.codes):
        mine = points[ids == code]
        size = 0.75 * before_size[code] + 0.25 * len(mine)
        average = 0.75 * before_avg[code] + 0.25 * mine.sum(0)
        torch.testing.assert_close(codebook.embedding[code], average / size, rtol=1e-4, atol=1e-5)


def test_two_ranks_update_as_one() -> None:
    points = vectors()
    alone, first, second = filled(), filled(), filled()
    ids = alone.nearest(points)
    alone.update(points, ids, torch.ones(len(ids)), lambda tensor: tensor)
    parts: list[torch.Tensor] = []
    first.update(
        points[:20], ids[:20], torch.ones(len(ids[:20])), lambda tensor: parts.append(tensor) or tensor
    )
    second.update(points[20:], ids[20:], torch.ones(len(ids[20:])), lambda tensor: tensor + parts[0])
    torch.testing.assert_close(second.embedding, alone.embedding)


def test_initialization_finds_clusters_deterministically() -> None:
    centers = torch.eye(4) * 10
    points = centers.repeat(30, 1) + 0.1 * torch.randn(120, 4, generator=torch.Generator().manual_seed(2))
    books = [Codebook(4, 4, 0.9, 0.1) for _ in range(2)]
    for book in books:
        book.initialize(points, seed=3)
    assert torch.equal(books[0].embedding, books[1].embedding)
    assert books[0].cluster_size.tolist() == [30.0] * 4
    torch.testing.assert_close(books[0].lookup(books[0].nearest(centers)), centers, atol=0.2, rtol=0)


@pytest.mark.parametrize("draw", [0, 5])
def test_dead_codes_are_replaced_by_candidates(draw: int) -> None:
    codebook, candidates = filled(), vectors(40) + 100
    codebook.cluster_size[2] = 1e-4
    before = codebook.embedding.clone()
    assert codebook.reset_dead_codes(candidates, seed=0, draw=draw).item() == 1
    changed = (codebook.embedding != before).any(dim=1)
    assert changed.tolist() == [code == 2 for code in range(6)]
    assert (candidates == codebook.embedding[2]).all(dim=1).any()
    torch.testing.assert_close(codebook.embedding_avg / codebook.cluster_size[:, None], codebook.embedding)
