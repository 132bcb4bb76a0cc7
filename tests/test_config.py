"""Settings: what is refused names the field, its value and what is allowed."""

import dataclasses

import pytest

from hf_paged.config import EngineConfig, available_memory


def test_defaults():
    config = EngineConfig()
    assert (config.page_size, config.max_sequences, config.backend) == (16, 128, "auto")
    assert config.num_pages is config.memory_fraction is config.max_model_len is config.seed is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 0),
        ("page_size", 257),
        ("page_size", 16.0),
        ("page_size", True),
        ("page_size", "16"),
        ("num_pages", 0),
        ("num_pages", -1),
        ("num_pages", 1.5),
        ("memory_fraction", 0),
        ("memory_fraction", 1.1),
        ("memory_fraction", float("nan")),
        ("memory_fraction", True),
        ("memory_fraction", "half"),
        ("max_model_len", 0),
        ("max_batch_tokens", 0),
        ("max_sequences", 0),
        ("max_sequences", None),
        ("seed", 1.0),
        ("seed", "x"),
        ("prefix_caching", 1),
        ("backend", "cuda"),
        ("backend", None),
        ("check", 1),
    ],
)
def test_bad_values(name, value):
    with pytest.raises(ValueError) as caught:
        EngineConfig(**{name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value) and "not allowed" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 1},
        {"page_size": 256},
        {"num_pages": 1},
        {"memory_fraction": 1},
        {"memory_fraction": 0.01},
        {"seed": -5},
        {"seed": 2**80},
        {"backend": "torch"},
        {"max_batch_tokens": 1, "max_sequences": 1, "max_model_len": 1},
    ],
)
def test_good_values(settings):
    config = EngineConfig.from_dict(settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_pages_and_fraction_contradict():
    with pytest.raises(ValueError, match=r"memory_fraction=0.5.*num_pages \(10\)"):
        EngineConfig(num_pages=10, memory_fraction=0.5)


def test_unknown_names():
    with pytest.raises(ValueError, match="'block_size'.*page_size"):
        EngineConfig.from_dict({"block_size": 16})
    with pytest.raises(ValueError, match="1"):
        EngineConfig.from_dict({1: 16})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().page_size = 3


def test_available_memory_is_plausible():
    assert 1 << 20 < available_memory() < 1 << 50


def test_a_disk_tier_wants_a_directory_and_room(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="disk_cache="):
        EngineConfig(disk_cache=tmp_path / "file")
    with pytest.raises(ValueError, match="disk_cache_bytes=0"):
        EngineConfig(disk_cache=tmp_path, disk_cache_bytes=0)
    EngineConfig(disk_cache=tmp_path / "new")
