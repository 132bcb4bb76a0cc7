"""Progress, summaries, the pool's size, and the benchmark's parts. Nothing here looks at a clock."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace

import pytest
from cli_helpers import save_tiny
from typer.testing import CliRunner

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.bench.evaluation import Watch, _made
from hf_paged.integrations.cli import app
from hf_paged.integrations.cli.eval import lines_of
from hf_paged.integrations.datasets import Shard, plot_summary, report
from hf_paged.integrations.datasets.pool import SLACK, pages_for
from hf_paged.integrations.datasets.processes import launched
from hf_paged.integrations.datasets.sight import MOST_SAMPLES, Glance, Sight
from hf_paged.integrations.datasets.summary import Summary
from hf_paged.speculation.stats import ProposerStats, SpeculationStats
from hf_paged.stats import EngineStats

GLANCE = Glance(9.0, 40, 2, 100, 512.0, 4.0, 3671.0, 0.875, None, 0.25, 31.5, 64)


def test_lines_tell_all_that_a_person_wants_to_know(capsys):
    lines = report.Lines(every=10.0)
    lines.begin(GLANCE)
    for seconds in (9.0, 10.5, 12.0, 21.0):
        lines.update(replace(GLANCE, seconds=seconds))
    lines.end(replace(GLANCE, acceptance=0.5, total=None, seconds_left=None))
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "hf-paged: 100 rows, 40 are written already"
    line = "rows, 4.0 rows/s, 512 tokens/s, prefix hits 88 %, {}batch 32, KV 25 %, failed 2, left {}"
    assert told[1] == told[2] == "hf-paged: 40/100 " + line.format("", "1:01:11")
    assert told[3:] == ["hf-paged: 40 " + line.format("drafts taken 50 %, ", "?")]


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    bar = report.make_reporter()
    bar.begin(GLANCE)
    bar.update(GLANCE)
    bar.end(replace(GLANCE, written=100))
    assert "40/100" in screen.getvalue() and "100/100" in screen.getvalue() and "failed 2" in screen.getvalue()


class FakeEngine:
    """Counters that grow: 10 rows, 100 tokens and 5 steps from one look to the next."""

    speculator = None
    looks = 0

    def stats(self):
        self.looks += 1
        at = self.looks
        return EngineStats(steps=5 * at, rows=40 * at, generated_tokens=100 * at, pages_free=75, pages_total=100)

    def speculation_stats(self):
        return SpeculationStats({"draft": ProposerStats(8, 6)})


def test_what_is_seen_is_kept_in_a_bounded_list():
    engine = FakeEngine()
    sight = Sight(engine, 10**6, 0)
    for written in range(10 * MOST_SAMPLES):
        glance = sight.look(written, 0, 5)
    assert MOST_SAMPLES / 2 <= len(sight.samples) <= MOST_SAMPLES
    seen = [sample[-1] for sample in sight.samples]
    assert seen == sorted(seen) and seen[-1] > 9 * MOST_SAMPLES
    assert (glance.kv_use, glance.batch, glance.acceptance) == (0.25, 8.0, None)
    engine.speculator = object()
    assert sight.look(1, 0, 5).acceptance == 0.75


def test_a_summary_says_what_came_of_a_run(tmp_path):
    summary = Summary("out", True, rows=10, rows_before=5, failed=2, errors={"bad": 2}, seconds=2.0, engine_seconds=1.9)
    summary.generated_tokens, summary.prompt_tokens, summary.cached_tokens = 100, 50, 150
    text = "\n".join(lines_of(summary))
    assert "15 rows in out" in text and "5 were there, 10 are new" in text and "2 × bad" in text
    assert "5.0 rows/s, 50 tokens/s, 2.0 s, of which outside the engine 5.0 %" in text and "75 % of prompt" in text
    assert "not all yet" in lines_of(replace(summary, finished=False))[0]
    told = json.loads(json.dumps(summary.to_dict()))
    assert told["hit_rate"] == 0.75 and told["acceptance"] is None
    plot_summary(told, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    with pytest.raises(BadInput, match="cannot be written"):
        plot_summary(told, tmp_path / "p.nonsense")


def test_the_pool_holds_what_rows_do_not_share():
    header, rows = list(range(160)), 100
    prompts = [header + [1000 + i, *range(31)] for i in range(20)]
    # 160 tokens once; for each row 32 of its own and 32 new ones: 4 pages and one more.
    assert pages_for(prompts, rows, 32, 16, 64) == int(SLACK * (rows * 5 + 10))
    assert pages_for([p[160:] for p in prompts], rows, 32, 16, 64) == int(SLACK * rows * 5)
    assert pages_for(prompts, 1, 32, 16, 4096) == 2 * 257
    assert pages_for([], 100, 32, 16, 64) == 2 * 5


def test_processes_share_rows_where_accelerate_started_them(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert not launched()  # torchrun: processes of one model
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launched()
    assert [row for row in range(9) if Shard.of((1, 3)).mine(row)] == [1, 4, 7]
    assert Shard.of(Shard(2, 4)) == Shard.of((2, 4)) == Shard(2, 4)


def test_the_pipelines_answers_are_cut_out_of_its_rows():
    assert _made([1, 1, 7, 8, 9, 5, 6], 3, 1, {0}) == [5, 6]
    assert _made([1, 7, 8, 5, 0, 1, 1], 2, 1, {0}) == [5, 0]


def test_memory_is_watched_from_row_100_on(monkeypatch):
    sizes = iter((5, 10, 30, 25))
    monkeypatch.setattr("hf_paged.integrations.bench.evaluation.resident", lambda: next(sizes))
    watch = Watch()
    for written in (99, 100, 500, 1000):
        watch.update(replace(GLANCE, written=written))
    assert watch.growth == 20 and Watch().growth is None


def test_the_benchmark_compares_tokens_with_the_pipelines(tmp_path):
    out = tmp_path / "report.json"
    sizes = ("--requests", "10", "--num-shots", "1", "--new-tokens", "5", "--batch-size", "4", "--peer-rows", "7")
    model = save_tiny(tmp_path / "model")
    result = CliRunner().invoke(app, ["bench", "eval", "--model", model, *sizes, "--json", str(out)])
    assert result.exit_code == 0, result.output
    told = json.loads(out.read_text())
    assert (told["requests"], told["peer_requests"]) == (10, 7)
    assert told["tokens_equal"] and told["same_in_every_run"]
    assert "all tokens equal" in result.stdout
