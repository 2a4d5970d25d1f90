import pytest
from tests.unit.learner.batches import make_batch

from poise.learner.storage.journal import Answer, Journal
from poise_client.codec import dump_batch
from poise_client.types import RolloutId, StepMetrics

ANSWER = Answer(
    "run",
    "step-1",
    "ab" * 32,
    3,
    "cd" * 32,
    StepMetrics(loss=0.1, gradient_norm=float("inf"), num_tokens=7, staleness={0: 5, 2: 1}),
    ((RolloutId("run", 1, "g", 0), "stale"),),
)


@pytest.fixture
def journal(tmp_path) -> Journal:
    journal = Journal(tmp_path / "journal")
    journal.open()
    return journal


def test_batch_and_answer_round_trip(journal):
    content = dump_batch(make_batch())
    journal.write_batch(4, content)
    journal.write_answer(4, ANSWER)
    assert dump_batch(journal.read_batch(4)) == content
    assert list(journal.answers()) == [(4, ANSWER)]
    assert journal.read_batch(5) is None


def test_every_damage_to_a_batch_is_detected(journal, tmp_path):
    journal.write_batch(0, dump_batch(make_batch(num_prompts=1)))
    path = tmp_path / "journal" / "batch-00000000.pb"
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"batch-00000000\.pb is damaged"):
            journal.read_batch(0)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"metrics": 1}', ANSWER.to_json()[:-40], "\0" * 30])
def test_damaged_answer_is_named_and_hides_no_other(journal, tmp_path, caplog, content):
    for sequence in range(3):
        journal.write_answer(sequence, ANSWER)
    (tmp_path / "journal" / "answer-00000001.json").write_text(content)
    assert list(journal.answers()) == [(0, ANSWER), (1, None), (2, ANSWER)]
    assert "answer-00000001.json is damaged" in caplog.text


def test_pruning_deletes_only_older_entries(journal, tmp_path):
    for sequence in range(6):
        journal.write_batch(sequence, dump_batch(make_batch()))
        journal.write_answer(sequence, ANSWER)
    journal.prune(before_batch=4, before_answer=2)
    assert [journal.read_batch(sequence) is not None for sequence in range(6)] == [False] * 4 + [True] * 2
    assert [sequence for sequence, _ in journal.answers()] == [2, 3, 4, 5]


def test_temporary_files_are_not_read_as_entries(journal, tmp_path):
    (tmp_path / "journal" / "batch-00000000.pb.tmp").write_bytes(b"half")
    (tmp_path / "journal" / "answer-00000000.json.tmp").write_bytes(b"half")
    assert journal.read_batch(0) is None
    assert list(journal.answers()) == []
    journal.prune(before_batch=9, before_answer=9)


def test_failures_count_for_the_same_batch_only(journal):
    first, other = dump_batch(make_batch(0)), dump_batch(make_batch(1))
    assert journal.num_failures(3, first) == 0
    assert [journal.add_failure(3, first, "out of memory") for _ in range(2)] == [1, 2]
    assert (journal.num_failures(3, first), journal.num_failures(3, other), journal.num_failures(4, first)) == (2, 0, 0)
    assert journal.add_failure(3, other, "out of memory") == 1
    journal.prune(before_batch=4, before_answer=0)
    assert journal.num_failures(3, other) == 0


@pytest.mark.parametrize("content", ["", "{", "\0" * 30])
def test_damaged_failure_count_is_ignored(journal, tmp_path, content):
    batch = dump_batch(make_batch(0))
    journal.add_failure(0, batch, "out of memory")
    (tmp_path / "journal" / "failures-00000000.json").write_text(content)
    assert journal.num_failures(0, batch) == 0
    assert journal.add_failure(0, batch, "out of memory") == 1
