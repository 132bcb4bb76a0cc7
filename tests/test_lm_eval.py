"""lm-evaluation-harness: `hf-paged` gives what `hf` gives, on local task files."""

import json
import textwrap

import pytest
from conftest import MODELS, tiny_llama
from typer.testing import CliRunner

from hf_paged.integrations.cli.app import app
from hf_paged.integrations.engine import Engine
from hf_paged.integrations.registry import REGISTRY

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hf_paged.integrations.lm_eval import PagedLM  # noqa: E402
from hf_paged.integrations.scoring_texts import encode_pairs  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
WORDS = "the price of apples and pears in seven small towns near a river where trains stop at noon"
WORDS = WORDS.split()
TASKS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        metric_list: [{metric: acc}, {metric: acc_norm}]
        num_fewshot: 2
        fewshot_split: train
        fewshot_config: {sampler: first_n}
        training_split: train
        """,
    "open": """
        output_type: generate_until
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["\\n", "e a"], max_gen_toks: 12}
        metric_list: [{metric: exact_match}]
        """,
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
        """,
}


def row(i):
    word = [WORDS[(i * k + k) % len(WORDS)] for k in range(1, 9)]
    choices = [word[4], f"{word[5]} {word[6]}", f"{i % 10}", f"{word[7]} and {word[3]}"]
    text = " ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(40 * i))
    return {"question": " ".join(word[:5]) + "?", "choices": choices, "answer": i % 4, "text": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose windows are short, its tokenizer with a chat template, and the tasks."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("lm-eval")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    tokenizer.chat_template = TEMPLATE
    model = tiny_llama(vocab_size=4096, max_position_embeddings=96)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for split, rows in (("test", range(10)), ("train", range(20, 24))):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in rows))
    for name, body in TASKS.items():
        files = f"{{test: {path / 'test.jsonl'}, train: {path / 'train.jsonl'}}}"
        given = f"{{data_files: {files}, cache_dir: {path / 'cache'}}}"
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {given}\ntest_split: test\n"
        (path / f"{name}.yaml").write_text(head + textwrap.dedent(body).strip() + "\n")
    return path


@pytest.fixture(scope="module")
def models(folder):
    arguments = {"pretrained": str(folder / "model"), "device": "cpu", "dtype": "float32"}
    paged = PagedLM(**arguments, batch_size="auto", page_size=4, num_pages=200, check=True)
    return {"hf": HFLM(**arguments, batch_size=3), "hf-paged": paged}


def evaluate(folder, lm, tasks, **rest):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, **rest)
    return found["results"], found["samples"]


def assert_same(folder, models, tasks, **rest):
    (hf, hf_samples), (paged, samples) = (evaluate(folder, models[n], tasks, **rest) for n in ("hf", "hf-paged"))
    for task in tasks:
        for name, value in hf[task].items():
            assert paged[task][name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
        key = lambda sample: sample["doc_id"]  # noqa: E731
        for a, b in zip(sorted(hf_samples[task], key=key), sorted(samples[task], key=key), strict=True):
            assert a["arguments"] == b["arguments"]
            assert str_of(a) == str_of(b)
            assert numbers_of(b) == pytest.approx(numbers_of(a), abs=1e-3)
    engine = REGISTRY.find(models["hf-paged"].model)
    engine.check()
    assert not engine.core.busy
    return samples


def flat(value):
    return [x for each in value for x in flat(each)] if isinstance(value, list | tuple) else [value]


def as_number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def numbers_of(sample):
    return [as_number(x) for x in flat(sample["resps"]) if as_number(x) is not None]


def str_of(sample):
    return [x for x in flat(sample["resps"]) if as_number(x) is None]


def test_same_results(folder, models):
    samples = assert_same(folder, models, ["local_choice", "local_rolling", "local_open"])
    assert len(samples["local_choice"]) == 10 and len(set(map(str, samples["local_rolling"]))) == 10
    answers = [sample["resps"][0][0] for sample in samples["local_open"]]
    assert len(set(answers)) > 3 and not any("\n" in answer or "e a" in answer for answer in answers)


def test_chat_templates(folder, models):
    samples = assert_same(folder, models, ["local_choice", "local_open"], apply_chat_template=True)
    context = samples["local_choice"][0]["arguments"][0][0]
    assert context.startswith("<user>Question:") and context.endswith("<a>")


def requests_of(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_odd_texts_are_tokenised_as_hf_does(models):
    bos = models["hf"].tokenizer.bos_token
    texts = [
        ("", " a river"),
        ("", bos + " trains"),
        ("near  ", "noon"),
        (bos + "seven", " towns"),
        (" x", "y z"),
        ("a ", "b"),
    ]
    requests = requests_of("loglikelihood", *texts, ("price of " * 300, "apples " * 20))
    hf, paged = (models[name].loglikelihood(requests, disable_tqdm=True) for name in ("hf", "hf-paged"))
    assert [x[1] for x in paged] == [x[1] for x in hf]
    assert [x[0] for x in paged] == pytest.approx([x[0] for x in hf], abs=1e-3)
    empty = requests_of("loglikelihood_rolling", ("",), ("a river",))
    assert models["hf-paged"].loglikelihood_rolling(empty)[0] == models["hf"].loglikelihood_rolling(empty)[0] == 0


def test_engine_tokenises_pairs_as_lm_eval_does(models):
    lm = models["hf"]
    with Engine(lm.model, tokenizer=lm.tokenizer, num_pages=64) as engine:
        texts = [
            ("near  ", "noon"),
            (" x", "y z"),
            ("a ", "b"),
            ("the price", " of apples"),
            ("seven small", "er towns"),
        ]
        pairs = encode_pairs(engine, *zip(*texts, strict=True))
        assert [(p.context, p.continuation) for p in pairs] == [lm._encode_pair(*each) for each in texts]
        scores = engine.score(["", *(a for a, _ in texts)], [" a river", *(b for _, b in texts)])
        found = lm.loglikelihood(requests_of("loglikelihood", ("", " a river"), *texts), disable_tqdm=True)
        assert [s.logprob for s in scores] == pytest.approx([x[0] for x in found], abs=1e-3)


@pytest.mark.slow
def test_answers_of_other_kinds(models):
    """Sampling settings of the model count; beams run as `hf` runs them."""
    arguments = [("Question: the price?\nAnswer:", {"until": ["\n"], "max_gen_toks": 8, "repetition_penalty": 1.3})]
    arguments += [("Question: a river?\nAnswer:", {"until": ["\n"], "max_gen_toks": 8, "num_beams": 2})]
    for each in arguments:
        requests = requests_of("generate_until", each)
        hf, paged = (models[name].generate_until(requests, disable_tqdm=True) for name in ("hf", "hf-paged"))
        assert hf == paged and hf[0]


def test_drafts_change_no_answer(models):
    hf = models["hf"]
    requests = requests_of(
        "generate_until", *((f"Question: {word} {word}?\nAnswer:", {"max_gen_toks": 6}) for word in WORDS)
    )
    expected = models["hf-paged"].generate_until(requests, disable_tqdm=True)
    for given in ({"speculation": "lookup"}, {"draft": hf.model}):
        lm = PagedLM(hf.model, tokenizer=hf.tokenizer, num_pages=200, page_size=4, **given)
        assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_partial_results_reach_the_cache(models):
    noted = {}

    class Hook:
        def add_partial(self, kind, key, result):
            noted[kind, str(key)] = result

    lm, before = models["hf-paged"], models["hf-paged"].cache_hook
    lm.set_cache_hook(Hook())
    try:
        pairs = [("the price", " of apples"), ("the price", " of pears")]
        found = lm.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True)
        total = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", ("a river " * 90,)), disable_tqdm=True)
        lm.generate_until(
            requests_of("generate_until", ("the", {"until": ["\n"], "max_gen_toks": 2})), disable_tqdm=True
        )
    finally:
        lm.set_cache_hook(before)
    assert [noted["loglikelihood", str(pair)] for pair in pairs] == found
    assert noted["loglikelihood_rolling", str(("a river " * 90,))] == total[0]
    assert any(kind == "generate_until" for kind, _ in noted)


def test_the_type_is_registered_and_takes_engine_settings(folder):
    cls = lm_eval.api.registry.get_model("hf-paged")
    text = f"pretrained={folder / 'model'},dtype=float32,page_size=8,num_pages=50,max_length=64"
    lm = cls.create_from_arg_string(text, {"device": "cpu", "batch_size": 1})
    engine = lm.paged_engine()
    assert engine.core.memory.page_size == 8 and engine.core.memory.pool.num_pages == 50 and lm.max_length == 64
    with pytest.raises(ValueError, match="softmax_dtype"):
        cls(str(folder / "model"), device="cpu", softmax_dtype="bfloat16")
    with pytest.raises(ValueError, match="page_size=0"):
        cls(str(folder / "model"), device="cpu", page_size=0)


@pytest.mark.slow  # the command reads all of lm-eval's own tasks first
def test_the_command_runs_lm_eval(folder, tmp_path):
    arguments = ["--model", "hf-paged", "--model_args", f"pretrained={folder / 'model'},dtype=float32,num_pages=200"]
    arguments += ["--device", "cpu", "--tasks", "local_choice", "--include_path", str(folder)]
    result = CliRunner().invoke(app, ["lm-eval", *arguments, "--output_path", str(tmp_path), "--seed", "0"])
    assert result.exit_code == 0, result.output
    (report,) = tmp_path.rglob("results_*.json")
    assert "local_choice" in json.loads(report.read_text())["results"]
