"""Keyed noise: every (seed, position, token) has its own Gumbel number, whatever else is being computed.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written
in int64 tensor operations so that it gives the same bits on any device:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (token // 4, position, 0, 0)
    word    = philox(counter, key)[token % 4]           # 32 bits
    u       = (word + 0.5) * 2**-32                     # float64, in (0, 1), exact
    noise   = -log(-log(u))                             # standard Gumbel, between -3.2 and 22.9

The largest of score + noise is then a draw from softmax(scores) (the Gumbel-max trick).
"""

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def seed_bits(seed: int) -> int:
    """The int64 that holds the bits of `seed` modulo 2**64; any Python int is a seed."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 of `counter` int64 [4, N] under `key` int64 [2, N]: 32-bit words, int64 [4, N]."""
    even, odd = _rounds(counter[0::2], counter[1::2], key, (2, counter.shape[1]))
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Noise of a flat list of candidates.

    seeds (bits of a 64-bit seed), positions, tokens: int64 [N]. Returns float64 [N].
    """
    block = torch.stack((tokens >> 2, torch.zeros_like(tokens)))
    place = torch.stack((positions & _MASK, torch.zeros_like(positions)))
    even, odd = _rounds(block, place, _key(seeds), (2, tokens.numel()))
    word = torch.where((tokens & 1).bool(), odd, even)
    return _to_gumbel(torch.where((tokens & 2).bool(), word[1], word[0]).double())


def gumbel_dense(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Noise of every token of a vocabulary: four tokens a Philox call, the same numbers as `gumbel` gives.

    seeds, positions: int64 [R]. Returns float64 [R, vocab].
    """
    blocks = (vocab + 3) // 4
    block = torch.arange(blocks, device=seeds.device)
    block = torch.stack((block, torch.zeros_like(block)))[:, None, :]
    place = torch.stack((positions & _MASK, torch.zeros_like(positions)))[:, :, None]
    even, odd = _rounds(block, place, _key(seeds)[:, :, None], (2, seeds.numel(), blocks))
    words = torch.empty(seeds.numel(), blocks, 2, 2, dtype=torch.int64, device=seeds.device)
    words[:, :, :, 0].copy_(even.permute(1, 2, 0))
    words[:, :, :, 1].copy_(odd.permute(1, 2, 0))
    return _to_gumbel(words.double()).view(seeds.numel(), blocks * 4)[:, :vocab]


def _key(seeds: torch.Tensor) -> torch.Tensor:
    return torch.stack((seeds & _MASK, (seeds >> 32) & _MASK))


def _to_gumbel(words: torch.Tensor) -> torch.Tensor:
    """float64 tensor of 32-bit words, overwritten with their noise."""
    return words.add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_()


def _rounds(
    even: torch.Tensor, odd: torch.Tensor, key: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten rounds over counter words (0, 2) in `even`, (1, 3) in `odd`: int64 [2, ...], broadcast to `shape`.

    A round is  c0, c1, c2, c3 = hi(c2 M1) ^ c1 ^ k0, lo(c2 M1), hi(c0 M0) ^ c3 ^ k1, lo(c0 M0).  Both
    products are done as one tensor. The two halves change places every round; instead of moving them, odd
    rounds hold them swapped, with multipliers and keys swapped too; after ten rounds they lie in order again.
    Products wrap to 64 signed bits, which keeps all 64 bits right; whole products are xored into `even`,
    whose bits above 32 are then masked off.
    """
    device = key.device
    pair = (2,) + (1,) * (len(shape) - 1)
    multiplier = torch.tensor(_MULTIPLIERS, device=device).view(pair)
    multipliers = (multiplier, multiplier.flip(0))
    turns = torch.arange(_ROUNDS, device=device).view(-1, *(1,) * len(shape))
    keys = (key + turns * torch.tensor(_WEYL, device=device).view(pair)) & _MASK
    keys[0::2] = keys[0::2].flip(1)
    even_out = torch.empty(shape, dtype=torch.int64, device=device)
    upper, lower = even_out.unbind(0)
    products = [torch.empty_like(even_out), torch.empty_like(even_out)]
    halves = [product.unbind(0) for product in products]
    product = even * multipliers[0]  # not broadcast yet: the first round costs next to nothing
    torch.bitwise_xor(product >> 32, odd.flip(0) ^ keys[0], out=even_out).bitwise_and_(_MASK)
    last = product.expand(shape).unbind(0)
    for turn in range(1, _ROUNDS):
        product = torch.mul(even_out, multipliers[turn & 1], out=products[turn & 1])
        torch.bitwise_right_shift(product, 32, out=even_out)
        upper.bitwise_xor_(last[1])
        lower.bitwise_xor_(last[0])
        even_out.bitwise_xor_(keys[turn]).bitwise_and_(_MASK)
        last = halves[turn & 1]
    return even_out, product.bitwise_and_(_MASK)
