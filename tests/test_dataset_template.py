"""Templates: what a row becomes, and how one that cannot become a prompt says so."""

from __future__ import annotations

import pickle

import pytest

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets import Recipe, Template
from hf_paged.integrations.datasets.readers import BadRow
from hf_paged.integrations.datasets.recipe import Ingest
from hf_paged.integrations.datasets.template import RowFailed
from hf_paged.params import SamplingParams

ROW = {"question": "Why?", "n": 3, "none": None, "Best Answer": "yes", "chat": [{"role": "user", "content": "Hi"}]}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("Q: {{ question }}\nA:", "Q: Why?\nA:"),
        ("{{ question }}\n", "Why?\n"),
        ("{% if n > 2 %}{{ n }}{% endif %}{{ missing | default('!') }}", "3!"),
        ("Q: {question} {n} {Best Answer} { } {}", "Q: Why? 3 yes { } {}"),
        ("no column at all", "no column at all"),
        (lambda row: row["question"] * 2, "Why?Why?"),
        (lambda row: [5, 6], [5, 6]),
        (lambda row: row["chat"], [{"role": "user", "content": "Hi"}]),
    ],
)
def test_a_row_becomes_a_prompt(source, prompt):
    assert Template(source)(ROW) == prompt


def test_by_default_it_is_the_column_prompt():
    assert Template()({"prompt": "x"}) == "x"
    assert Template(messages="chat")(ROW) == ROW["chat"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ nope }}", "names what the row has not: 'nope' is undefined"),
        ("{nope}", "no column 'nope'"),
        ("{{ none }}", "would print None"),
        ("{none}", "column 'none' is a NoneType"),
        ("{chat}", "column 'chat' is a list"),
        ("{{ n / 0 }}", "does not render: ZeroDivisionError"),
        ("{{ n + question }}", "does not render: TypeError"),
        (lambda row: row["nope"], "the template function failed: KeyError"),
        (lambda row: 5, "are no list of dicts with role and content"),
    ],
)
def test_a_row_that_gives_no_prompt_says_why(source, message):
    with pytest.raises(RowFailed, match=message):
        Template(source)(ROW)


def test_a_row_that_is_none_fails_as_its_reader_said():
    with pytest.raises(RowFailed, match="line 3 is no JSON object"):
        Template("x")(BadRow("line 3 is no JSON object"))


def test_a_column_that_no_row_can_have_is_refused_with_those_there_are():
    for source in ("{{ qestion }}", "{qestion}"):
        with pytest.raises(BadInput, match="qestion.*the dataset has question, n,"):
            Template(source).check([BadRow("damaged"), ROW])
    Template("{none}").check([ROW])  # one row's value is that row's affair
    Template("{nope}").check([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Template("{% if %}"), "does not compile: line 1"),
        (lambda: Template(5), "template is a int"),
        (lambda: Template("x", messages="chat"), "not both"),
        (lambda: Template.load("nowhere.jinja"), "nowhere.jinja: no such file"),
        (lambda: Recipe(too_long="cut"), "too_long='cut': must be one of fail, truncate-left"),
        (lambda: Recipe(sampling=SamplingParams(n=2)), "sampling.n=2"),
        (lambda: Recipe(seed="7"), "seed='7'"),
    ],
)
def test_what_can_be_no_template_is_refused(make, message):
    with pytest.raises(BadInput, match=message):
        make()


def test_a_template_is_read_from_a_file_less_its_last_newline(tmp_path):
    (tmp_path / "t.jinja").write_text("Q: {{ question }}\nA:\n")
    assert Template.load(str(tmp_path / "t.jinja"))(ROW) == "Q: Why?\nA:"
    assert Template.load(r"{question}\nA:", escapes=True)(ROW) == "Why?\nA:"
    assert Template.load(r"{question}\nA:")(ROW) == r"Why?\nA:"


def test_templates_survive_a_pickle():
    for template in (Template("{{ question }}"), Template("{question}"), Template(messages="chat"), Template()):
        row = ROW | {"prompt": "p"}
        assert pickle.loads(pickle.dumps(template))(row) == template(row)


def prepared(tokenizer, rows, room=100, **recipe):
    made = Ingest(Recipe(**recipe), tokenizer, room, 4)(list(enumerate(rows)))
    return {ready.row: ready for ready in made}


def test_tokens_are_those_that_the_tokenizer_gives(tokenizer):
    texts = ["one", "", "two <|endoftext|> three", "ünï ∑ 漢字", "a  b\n\n"]
    made = prepared(tokenizer, [{"prompt": text} for text in texts])
    for i, text in enumerate(texts):
        assert (made[i].prompt, made[i].ids) == (text, tokenizer(text)["input_ids"])


def test_chat_templates_are_used_and_add_no_special_tokens_twice(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    for made in (
        prepared(tokenizer, [ROW], template=Template(messages="chat")),
        prepared(tokenizer, [ROW], template=Template(lambda row: "Hi"), chat=True),
    ):
        assert made[0].prompt == "<user>Hi<bot>"
        assert made[0].ids == tokenizer("<user>Hi<bot>", add_special_tokens=False)["input_ids"]
    bad = prepared(tokenizer, [{"chat": [{"role": "user"}]}, {"chat": "Hi"}], template=Template(messages="chat"))
    assert "are no list of dicts" in bad[1].error


def test_a_chat_needs_a_chat_template(tokenizer):
    with pytest.raises(BadInput, match="no chat template"):
        prepared(tokenizer, [ROW], chat=True)


def test_a_text_that_cannot_be_tokenised_fails_alone(tokenizer):
    made = prepared(tokenizer, [{"prompt": "good"}, {"prompt": "bad \ud800"}, {"prompt": "good too"}])
    assert "cannot be tokenised" in made[1].error
    assert made[0].ids and made[2].ids and made[0].error is made[2].error is None


def test_a_long_prompt_loses_its_beginning_where_that_is_asked_for(tokenizer):
    rows = [{"prompt": "one two three four five six seven eight nine ten"}]
    whole = tokenizer(rows[0]["prompt"])["input_ids"]
    cut = prepared(tokenizer, rows, room=5, too_long="truncate-left")[0]
    assert (cut.ids, cut.truncated) == (whole[-5:], len(whole) - 5)
    tokenizer.bos_token_id = whole[0]
    try:
        cut = prepared(tokenizer, rows, room=5, too_long="truncate-left")[0]
    finally:
        tokenizer.bos_token_id = 0
    assert cut.ids == [whole[0], *whole[-4:]]
    assert prepared(tokenizer, rows, room=5)[0].ids == whole
