"""Questions with their demonstrations, the embedded task with its base model, and token-budget micro-batches."""

import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if torch.version.cuda is None:
    # Builds of these for CUDA, which a CPU-only vLLM draws in, fail on import beside a CPU build of torch and take
    # transformers with them. Nothing here looks at images or listens to sound.
    for name in ("torchvision", "torchaudio", "torchcodec"):
        sys.modules.setdefault(name, None)

import datasets
import jinja2
import pyarrow.parquet
import tokenizers
import transformers
from tqdm import tqdm


@dataclass
class Question:
    id: str  # stable over runs and world sizes
    prompt: list[int]  # token ids exactly as the model sees them
    answer: str  # the gold answer
    demonstration: (
        list[int] | None
    )  # token ids of an expert's response with its end-of-text token; None: there is none
    level: str = ""  # difficulty or category, for reports
    kind: str = "math"  # how an answer is checked: math | number | choice | countdown | chain
    behavior_logprobs: list[float] | None = (
        None  # of the demonstration's tokens, under the model that wrote it
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a file or a Hub dataset


def _cached(cache_dir, name: str, write: Callable[[Path], object]) -> Path:
    """The file that write(path) makes in cache_dir, or an earlier run (or rank 0) has made; whole or not at all."""
    path = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "mifo") / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{name}.{os.getpid()}")
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _stamp(path: Path) -> str:
    return _digest(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:16]


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if (
            b"\\ud" in line or b"\\uD" in line
        ):  # half a surrogate pair is legal JSON but no text that a tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not readable JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f'{where} is a {type(row).__name__}, not an object like {{"question": ..., "answer": ...}}'
        )
    return row


class JsonRows(Sequence):
    """The rows of a JSONL file as dicts. Text stays on disk; where its lines begin is kept in memory.

    Arrow would need one type a column and would turn dates and long integers into something else, so rows are read by
    Python's json (no slower: nearly all the bytes are long strings). Opening reads every line once, and names the first
    that is not JSON. Blank lines, a byte order mark and CRLF are fine.
    """

    def __init__(self, path: Path, cache_dir=None):
        self.path = path
        self.fingerprint = _stamp(path)
        index = json.loads(
            _cached(cache_dir, f"rows-{self.fingerprint}.json", self._index).read_text()
        )
        self.starts, self.column_names = index["starts"], index["columns"]

    def _index(self, part: Path) -> None:
        starts, columns, end = [], {}, 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                start, end = end, end + len(line)
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    columns |= dict.fromkeys(_parse(line, f"{self.path}: line {number}"))
                    starts.append(start)
        part.write_text(json.dumps({"starts": starts, "columns": list(columns)}))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict:
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return _parse(file.readline(), f"{self.path}: row {i}")


def _array_as_lines(path: Path, cache_dir) -> Path:
    """A .json file that is one array, as JSONL in the cache; the path itself if it holds one object a line."""
    with path.open("rb") as file:
        if not re.match(rb"(\xef\xbb\xbf)?\s*\[", file.read(64)):
            return path
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the array is not readable JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: element {number} is a {type(row).__name__}, not an object")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return _cached(cache_dir, f"array-{_digest(text)}.jsonl", lambda part: part.write_text(text))


def load_rows(
    source: str,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    cache_dir=None,
) -> Sequence:
    """The rows of `path.jsonl`, `path.json` (lines, or one array), `path.parquet` or the Hub dataset `owner/name`.

    A sequence of dicts with .column_names that stays on disk: JsonRows, or a memory-mapped datasets.Dataset. split is
    "train" unless given. Raises ValueError, one line, on whatever cannot be read.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet"):
        if split or config or revision:
            raise ValueError(
                f"{source}: split, config and revision are for Hub datasets, not for a file"
            )
        if not path.is_file():
            raise ValueError(f"{source}: no such file")
        if path.suffix == ".parquet":
            rows = _parquet_rows(path, cache_dir)
        else:
            rows = JsonRows(
                _array_as_lines(path, cache_dir) if path.suffix == ".json" else path, cache_dir
            )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        try:
            rows = datasets.load_dataset(
                source, config, split=split or "train", revision=revision, cache_dir=cache_dir
            )
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"{source}: not loaded from the Hub: {' '.join(str(error).split())}; right would be an "
                "owner/name that is there and reachable, or a .jsonl or .parquet file"
            ) from None
    else:
        raise ValueError(
            f"{source}: neither a .jsonl, .json or .parquet file nor a Hub dataset owner/name"
        )
    if not len(rows):
        raise ValueError(f"{source}: holds no rows")
    return rows


def _parquet_rows(path: Path, cache_dir) -> datasets.Dataset:
    """By way of a copy in Arrow's own format, which can be memory-mapped.

    Made in small batches, without reading ahead: memory stays small even if the file is one row group.
    """

    def write(part):
        with (
            pyarrow.OSFile(str(part), "wb") as sink,
            pyarrow.ipc.new_stream(sink, file.schema_arrow) as stream,
        ):
            for batch in file.iter_batches(batch_size=256):
                stream.write_batch(batch)

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, memory_map=True) as file:
            return datasets.Dataset.from_file(
                str(_cached(cache_dir, f"rows-{_stamp(path)}.arrow", write))
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a readable parquet file: {' '.join(str(error).split())}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: what is asked, its answer, its demonstration


def _text(value) -> str:
    """A cell as text: numbers are written out; null, NaN and whatever is not text are empty."""
    if isinstance(value, str):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return str(value) if number else ""


def _messages(value) -> list[dict]:
    """A cell as chat messages, [] unless it is a list of {role, content} with text in it; text alone is the user's."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    good = (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )
    return [{"role": m["role"], "content": m["content"]} for m in value] if good else []


def row_reader(
    rows: Sequence,
    source: str,
    question_field: str | None = None,
    answer_field: str | None = None,
    solution_field: str | None = None,
) -> Callable[[dict], tuple[list[dict], str, str, str]]:
    """A function row -> (messages, gold, demonstration, kind), "" where the row has none, for the layout of the rows.

    Fields given by name come first; else the columns decide: `prompt` and `reward_model` (`target` optional) are chat
    messages as in OpenR1-Math-46k; `problem` or `question`, and `answer` (`solution` optional), are MATH and its like.
    Where answers end in `#### N` they are worked solutions (GSM8K): gold is N without commas, the answer demonstrates.
    A column `kind` says how the answer of a row is checked (KINDS); else it is number for worked solutions, or math.
    Raises ValueError with the columns found.
    """
    columns = list(rows.column_names)
    found = " ".join(", ".join(columns).split())[:300]
    fields = "--question-field, --answer-field and, for demonstrations, --solution-field"
    if question_field or answer_field or solution_field:
        if not (question_field and answer_field):
            raise ValueError(
                "--question-field and --answer-field are needed together; --solution-field is optional"
            )
        missing = [
            f for f in (question_field, answer_field, solution_field) if f and f not in columns
        ]
        if missing:
            raise ValueError(
                f"{source}: no column {', '.join(missing)}; found {found} (see {fields})"
            )
    elif {"prompt", "reward_model"} <= set(columns):
        return _read_chat
    else:
        question_field = next((f for f in ("problem", "question") if f in columns), None)
        answer_field, solution_field = "answer", "solution"
        if not question_field or answer_field not in columns:
            raise ValueError(
                f"{source}: no known layout; found {found}; name the columns by {fields}"
            )
    worked = any("####" in _text(rows[i].get(answer_field)) for i in range(min(20, len(rows))))

    def read(row):
        answer, solution = _text(row.get(answer_field)), _text(row.get(solution_field))
        messages = _messages(_text(row.get(question_field)))
        if not worked:
            return messages, answer.strip(), solution, _text(row.get("kind")) or "math"
        return (
            messages,
            _after_hashes(answer),
            solution or answer,
            _text(row.get("kind")) or "number",
        )

    return read


def _read_chat(row: dict) -> tuple[list[dict], str, str, str]:
    reward, target = row.get("reward_model"), _messages(row.get("target"))
    gold = _text(reward.get("ground_truth")) if isinstance(reward, dict) else ""
    return (
        _messages(row.get("prompt")),
        gold.strip(),
        target[0]["content"] if target else "",
        "math",
    )


def _after_hashes(text: str) -> str:
    """N of a last `#### N`, without its thousands commas; "" if there is none."""
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and demonstrations as the model sees them


def prompt_text(
    tokenizer,
    question: str | list[dict],
    system: str | None = None,
    generation_prefix: str = "",
    template: str = "auto",
) -> str:
    """The prompt as text. question is text or chat messages; the rest as for render_prompt."""
    if template not in ("auto", "chat", "plain"):
        raise ValueError(f"--template must be auto, chat or plain, not {template}")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("--template chat: this tokenizer has no chat template; use plain, or auto")
    messages = _messages(question)
    if system is not None:
        messages = [m for m in messages if m["role"] != "system"]
        messages = ([{"role": "system", "content": system}] if system else []) + messages
    if template == "plain" or not tokenizer.chat_template:
        before = "".join(m["content"] + "\n\n" for m in messages[:-1])
        text = f"{before}Question: {messages[-1]['content']}\nAnswer:\n"
    else:
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the tokenizer's chat template refuses the prompt ({error}); "
                "use --template plain, or --system '' if it is the system prompt"
            ) from None
    return text if text.endswith(generation_prefix) else text + generation_prefix


def render_prompt(
    tokenizer,
    question: str | list[dict],
    system: str | None = None,
    generation_prefix: str = "",
    template: str = "auto",
) -> list[int]:
    """The prompt's token ids, exactly as the model sees them.

    template: "chat" is the tokenizer's own; "plain" is "Question: ...\\nAnswer:\\n", for base models, after the system
    prompt and a blank line if there is one; "auto" is chat where the tokenizer has a chat template.
    system: None keeps the data's own system prompt, "" drops it (the chat template may then put its own default, as
    Qwen's do), any other text takes its place.
    generation_prefix ends the prompt (`<think>\\n`), once: nothing is added if the chat template writes it already.
    A chat template writes its own begin-of-text token; a plain prompt gets one if the tokenizer adds it by default.
    """
    text = prompt_text(tokenizer, question, system, generation_prefix, template)
    return _bos(tokenizer, template) + _encode(tokenizer, [text])[0]


def response_text(tokenizer, demonstration: str, prompt: str, generation_prefix: str = "") -> str:
    """The demonstration less what ends the prompt already (generation_prefix or `<think>\\n`), and less end-of-text.

    It is tokenised apart from the prompt: the policy, too, goes on from the prompt's own tokens, so no token may reach
    over the seam. (Hence also the plain template's newline: a response's first word then needs no space before it.)
    """
    for prefix in (generation_prefix, "<think>\n"):
        if prefix and prompt.endswith(prefix) and demonstration.startswith(prefix):
            demonstration = demonstration[len(prefix) :]
            break
    ended = demonstration.rstrip()
    return (
        ended.removesuffix(tokenizer.eos_token)
        if ended.endswith(tokenizer.eos_token)
        else demonstration
    )


def _bos(tokenizer, template: str) -> list[int]:
    if template != "plain" and tokenizer.chat_template:
        return []
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids


def _lengths(tokenizer, texts: list[str]) -> list[int]:
    """Tokens of each text, counted on all cores without the records of where each token began."""
    if not tokenizer.is_fast:
        return list(map(len, _encode(tokenizer, texts)))
    return list(
        map(len, tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Questions


KINDS = (
    "math",
    "number",
    "choice",
    "countdown",
)  # of the answers in files and Hub datasets, as eval.py checks them
NUMBER = re.compile(r"-?\$?(\d+\.?\d*|\.\d+)%?")
PLAIN_GOLD = re.compile(
    r"-?\d+(\.\d+)?|-?\\d?frac\{\d+\}\{\d+\}"
)  # anything else is shown to the checker
BATCH_CHARS = (
    1 << 22
)  # text tokenised at a time: enough for all cores; the tokenizer's own records are 20 times its size
COUNTED_CHARS = (
    1 << 24
)  # of demonstrations whose tokens are counted at load: seconds; beyond that, when first asked for


class Questions(Sequence):
    """Questions read and tokenised when they are asked for: memory holds the row numbers of those kept, no text.

    In large data the lengths of most demonstrations are not known before: open counts the rows of which that is so. One that
    proves too long is None, for that row's question remains of use to RL.
    dropped: {reason: count}; dropped_rows: {reason: row numbers}; rows count from 0. fingerprint names this very choice
    of rows, so ranks (which may read different caches) can compare it. Made by load_questions.
    """

    def __init__(self, rows, read, tokenizer, max_response, system, generation_prefix, template):
        self.rows, self.read, self.tokenizer, self.max_response, self.open = (
            rows,
            read,
            tokenizer,
            max_response,
            0,
        )
        self.style = (system, generation_prefix, template)
        self.kept, self.bare, self.repeated, self.dropped_rows, self.fingerprint = (
            [],
            set(),
            set(),
            {},
            "",
        )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, k: int) -> Question:
        i = self.kept[k]
        row = self.rows[i]
        messages, gold, demonstration, kind = self.read(row)
        tokens = None
        if demonstration:
            before = prompt_text(self.tokenizer, messages, *self.style)
            text = response_text(self.tokenizer, demonstration, before, self.style[1])
            tokens = _encode(self.tokenizer, [text])[0] + [self.tokenizer.eos_token_id]
            if len(tokens) > self.max_response:
                tokens = None
        return Question(
            id=self._id(i, row) + (f"#{i}" if i in self.repeated else ""),
            answer=gold,
            kind=kind,
            prompt=render_prompt(self.tokenizer, messages, *self.style),
            demonstration=tokens,
            level=_text(row.get("level")) or _text(row.get("subject")),
            behavior_logprobs=row.get("behavior_logprobs") if tokens else None,
        )

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: len(rows) for reason, rows in self.dropped_rows.items()}

    def report(self) -> str:
        faults = ", ".join(
            f"{len(rows)} {reason} (first: row {rows[0]})"
            for reason, rows in self.dropped_rows.items()
        )
        later = (
            f"; of {self.open} demonstrations the tokens are counted when they are first used"
            if self.open
            else ""
        )
        return (
            f"{len(self)} of {len(self.rows)} questions kept"
            + (f"; dropped: {faults}" if faults else "")
            + later
        )

    @staticmethod
    def _id(i: int, row: dict) -> str:
        return _text(row.get("unique_id")) or str(i)

    def _screen(self, max_prompt: int, checker) -> dict:
        """Every row once, in batches: {kept, bare (places among them without a demonstration), repeated (row numbers whose
        own id had been taken), dropped, open}."""
        found, self.open, self.to_count = (
            {"kept": [], "bare": [], "repeated": [], "dropped": {}},
            0,
            COUNTED_CHARS,
        )
        ids, gold_passes, batch, size = set(), {}, [], 0
        for i, row in enumerate(
            tqdm(self.rows, desc="checking questions", unit="row", disable=None)
        ):
            batch.append((i, row, *self.read(row)))
            size += len(batch[-1][4])
            if size < BATCH_CHARS and len(batch) < 512 and i + 1 < len(self.rows):
                continue
            faults = self._faults(batch, max_prompt, checker, gold_passes)
            for (i, row, _, _, demonstration, _), fault in zip(batch, faults):
                if fault:
                    found["dropped"].setdefault(fault, []).append(i)
                    continue
                if not demonstration:
                    found["bare"].append(len(found["kept"]))
                found["kept"].append(i)
                if self._id(i, row) in ids:
                    found["repeated"].append(i)
                ids.add(self._id(i, row))
            batch, size = [], 0
        return found | {"open": self.open}

    def _faults(self, batch: list, max_prompt: int, checker, gold_passes: dict) -> list[str]:
        """Why each of the batch's rows is dropped; "" if it is kept. Cheap tests come first, the checker last."""
        prompts, responses = [""] * len(batch), [""] * len(batch)
        faults = [""] * len(batch)
        for b, (_, row, messages, gold, demonstration, kind) in enumerate(batch):
            if (
                not messages
                or messages[-1]["role"] == "system"
                or not messages[-1]["content"].strip()
            ):
                faults[b] = "no question"
            elif not gold:
                faults[b] = "no gold answer"
            elif kind not in KINDS:
                faults[b] = f"kind is none of {', '.join(KINDS)}"
            elif kind == "number" and not NUMBER.fullmatch(gold):
                faults[b] = "gold answer cannot be parsed"
            else:
                prompts[b] = prompt_text(self.tokenizer, messages, *self.style)
                if demonstration:
                    responses[b] = response_text(
                        self.tokenizer, demonstration, prompts[b], self.style[1]
                    )
                    if self.tokenizer.eos_token in responses[b]:
                        faults[b] = "demonstration holds the end-of-text token"
                    elif not self._logprobs_match(row, responses[b]):
                        faults[b] = (
                            "behavior_logprobs are not one number for each demonstration token"
                        )
        for texts, limit, fault in (
            (prompts, max_prompt - len(_bos(self.tokenizer, self.style[2])), "prompt too long"),
            (responses, self.max_response - 1, "demonstration too long"),
        ):
            todo = [b for b in range(len(batch)) if not faults[b]]
            for b, long in zip(
                todo, self._too_long([texts[b] for b in todo], limit, texts is responses)
            ):
                faults[b] = fault if long else ""
        if checker is None:
            return faults
        asked = {
            (batch[b][3], batch[b][5]) for b in range(len(batch)) if not faults[b]
        } - gold_passes.keys()
        asked = sorted(a for a in asked if not PLAIN_GOLD.fullmatch(a[0]))
        gold_passes.update(
            zip(asked, checker.check_golds(*map(list, zip(*asked))) if asked else [])
        )
        for b, (_, _, _, gold, _, kind) in enumerate(batch):
            if not faults[b] and gold_passes.get((gold, kind), "correct") != "correct":
                faults[b] = "gold answer cannot be parsed"
        todo = [b for b in range(len(batch)) if batch[b][4] and not faults[b]]
        verdicts = checker.check(
            [batch[b][4] for b in todo], [batch[b][3] for b in todo], [batch[b][5] for b in todo]
        )
        for b, verdict in zip(todo, verdicts):
            if verdict != "correct":
                faults[b] = "demonstration does not verify against its gold answer"
        return faults

    def _too_long(self, texts: list[str], limit: int, bounded: bool) -> list[bool]:
        """Whether each text has more than limit tokens; only what its length leaves open is tokenised, and if that is
        bounded, no more than self.to_count characters of it: what lies beyond passes.

        No tokenizer makes more tokens of ASCII text than it has characters (and a leading space), and none gets by on
        one token for 128 characters of a whole text.
        """
        least = [
            0 if t.isascii() and len(t) < limit else limit + 1 if len(t) > 128 * limit else None
            for t in texts
        ]
        unknown = [k for k, n in enumerate(least) if n is None]
        for k in unknown if bounded else ():
            if self.to_count < len(texts[k]):
                least[k] = 0
                self.open += 1
            self.to_count -= len(texts[k])
        lengths = iter(_lengths(self.tokenizer, [t for t, n in zip(texts, least) if n is None]))
        return [(next(lengths) if n is None else n) > limit for n in least]

    def _logprobs_match(self, row: dict, response: str) -> bool:
        logprobs = row.get("behavior_logprobs")
        if logprobs is None:
            return True
        numbers = isinstance(logprobs, list) and all(
            isinstance(x, (int, float)) and -1e9 < x < 1e-3 for x in logprobs
        )
        return numbers and len(logprobs) == _lengths(self.tokenizer, [response])[0] + 1


def load_questions(
    source: str,
    tokenizer,
    *,
    max_prompt: int,
    max_response: int,
    checker=None,
    question_field: str | None = None,
    answer_field: str | None = None,
    solution_field: str | None = None,
    system: str | None = None,
    generation_prefix: str = "",
    template: str = "auto",
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    cache_dir=None,
) -> Questions:
    """The questions of a file or Hub dataset (load_rows, row_reader, render_prompt), less those that cannot be used.

    max_prompt and max_response in tokens, end-of-text included. checker is an eval.Checker (check, check_golds,
    extract, require_think); without it no answer is verified. A row is dropped for whatever is wrong with it, its
    demonstration included; a row that has no demonstration is kept. (In large data a demonstration that is too long may only
    be found so when it is asked for: Questions.) The outcome is remembered in cache_dir (by data,
    tokenizer, settings and this file's text), so only the first load checks: on many ranks, load on rank 0, wait, then
    load on the others with the same arguments. Raises ValueError, one line, if nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token), so demonstrations cannot end"
        )
    rows = load_rows(source, split, config, revision, cache_dir)
    read = row_reader(rows, source, question_field, answer_field, solution_field)
    questions = Questions(rows, read, tokenizer, max_response, system, generation_prefix, template)
    vocabulary = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else sorted(tokenizer.get_vocab().items())
    )
    key = _digest(
        rows.fingerprint if isinstance(rows, JsonRows) else rows._fingerprint,
        question_field,
        answer_field,
        solution_field,
        vocabulary,
        tokenizer.chat_template,
        tokenizer.bos_token,
        tokenizer.eos_token,
        questions.style,
        max_prompt,
        max_response,
        Path(__file__).read_bytes(),
        checker
        and (checker.extract, checker.require_think, importlib.metadata.version("math-verify")),
    )

    def screen(part):
        part.write_text(json.dumps(questions._screen(max_prompt, checker)))

    found = json.loads(_cached(cache_dir, f"questions-{key}.json", screen).read_text())
    questions.kept, questions.dropped_rows, questions.open = (
        found["kept"],
        found["dropped"],
        found["open"],
    )
    questions.bare, questions.repeated = set(found["bare"]), set(found["repeated"])
    questions.fingerprint = _digest(key, questions.kept)
    if not questions.kept:
        raise ValueError(f"{source}: no question is left: {questions.report()}")
    return questions


def system_prompt(questions: "Questions") -> str | None:
    """The data's own system prompt: its first row's, None if that has none."""
    messages = questions.read(questions.rows[questions.kept[0]])[0]
    return next((message["content"] for message in messages if message["role"] == "system"), None)


def demonstrated(questions: Sequence[Question]) -> list[int]:
    """The places of the questions that have a demonstration, found without tokenising any: it may prove too long."""
    if isinstance(questions, Questions):
        return [i for i in range(len(questions)) if i not in questions.bare]
    return [i for i, question in enumerate(questions) if question.demonstration is not None]


# ---------------------------------------------------------------------------------------------------------------------
# The embedded task: chains of additions modulo 100, harder with every term. Each term after the first has a letter, by which
# a worked answer finds it. The base model has read right answers to chains of up to five terms, and wrong ones to longer
# chains: there it guesses every sum, and no reward ever tells it which guess was right.
#   question           03a8b9?
#   base's style       03a8=11;11b9=20;[20]
#   expert's style     <03a8>11<11b9>20[20]

BASE_TERMS, WRONG_TERMS, TRAIN_TERMS, EVAL_TERMS = (
    (2, 3, 4, 5),
    (6, 7),
    (3, 4, 5, 6, 7),
    (3, 4, 5, 6, 7),
)
BASE_STEPS, BASE_BATCH, BASE_LR, EXPERT_SHARE, WRONG_SHARE = 800, 32, 2e-3, 0.3, 0.15


def chain(
    rng: random.Random, terms: int, expert: bool, wrong: bool = False
) -> tuple[str, str, str]:
    """A random chain of `terms` terms: (question, worked answer in one of the two styles, result); wrong: sums are random."""
    value = rng.randrange(100)
    question, work = f"{value:02d}", ""
    for letter in "abcdefgh"[: terms - 1]:
        term = f"{letter}{rng.randrange(1, 10)}"
        result = rng.randrange(100) if wrong else (value + int(term[1])) % 100
        question += term
        work += f"<{value:02d}{term}>{result:02d}" if expert else f"{value:02d}{term}={result:02d};"
        value = result
    return question + "?", f"{work}[{value:02d}]", f"{value:02d}"


def embedded_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789abcdefgh=;?[]<>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )


def embedded_questions(tokenizer, name: str, terms: tuple[int, ...], count: int) -> list[Question]:
    """`count` questions, the numbers of terms in turn, all with demonstrations in the expert's style; a name is a fixed set.

    A fifth of all chains, by checksum, is kept for the set named "eval" and is in no other.
    """
    rng, questions = random.Random(name), []
    for i in range(count):
        question = None
        while question is None or (zlib.crc32(question.encode()) % 5 == 0) != (name == "eval"):
            question, work, result = chain(rng, terms[i % len(terms)], expert=True)
        demonstration = tokenizer.encode(work) + [tokenizer.eos_token_id]
        questions.append(
            Question(
                f"{name}-{i}",
                tokenizer.encode(question),
                result,
                demonstration,
                str(terms[i % len(terms)]),
                "chain",
            )
        )
    return questions


def base_chain(rng: random.Random) -> tuple[str, str]:
    """(question, worked answer) as the base model reads them: three in ten in the expert's style, long chains wrong."""
    wrong = rng.random() < WRONG_SHARE
    question, work, _ = chain(
        rng, rng.choice(WRONG_TERMS if wrong else BASE_TERMS), rng.random() < EXPERT_SHARE, wrong
    )
    return question, work


def make_base(
    folder: Path,
    seed: int,
    tokenizer,
    example: Callable[[random.Random], tuple[str, str]],
    steps: int = BASE_STEPS,
    say=print,
) -> None:
    """Trains a base model from random weights on (question, worked answer) examples, and saves it with its tokenizer.

    A Qwen2 of 0.5 M parameters; about a minute on 2 cores.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"base-{seed}")
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), BASE_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    start = time.perf_counter()
    for step in range(steps):
        warm, left = (step + 1) / 50, (steps - step) / steps
        optimizer.param_groups[0]["lr"] = BASE_LR * min(1.0, warm, 2 * left)
        rows = []
        for _ in range(BASE_BATCH):
            question, work = example(rng)
            rows.append(
                (tokenizer.encode(question), tokenizer.encode(work) + [tokenizer.eos_token_id])
            )
        batch = collate(rows, tokenizer.pad_token_id)
        hidden = model.model(input_ids=batch["tokens"][:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[batch["mask"]])
        loss = torch.nn.functional.cross_entropy(logits, batch["tokens"][:, 1:][batch["mask"]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            say(
                f"base model: step {step + 1}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s"
            )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def draw(length: int, seed: int, start: int, count: int) -> list[int]:
    """`count` places from the start-th on of an endless stream over range(length); each pass is a new permutation."""
    places: list[int] = []
    while len(places) < count:
        epoch, i = divmod(start + len(places), length)
        order = torch.randperm(
            length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        )
        places += order[i : i + count - len(places)].tolist()
    return places


def collate(rows: list[tuple[list[int], list[int]]], pad_id: int, **extras) -> dict[str, Tensor]:
    """(prompt, response) pairs as right-padded tokens [B, T] and mask [B, T-1], True where the next token is response.

    Masks come from lengths, never from token ids, so a pad token that doubles as end-of-text is harmless; and as padding
    stands only on the right, causal attention never sees it. Each extra is one list a row, of one value per response token
    (None: zeros), and becomes float32 [B, T-1] aligned with the mask.
    """
    width = max(len(p) + len(r) for p, r in rows)
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    aligned = {key: torch.zeros(len(rows), width - 1) for key in extras}
    for i, (prompt, response) in enumerate(rows):
        tokens[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        mask[i, at] = True
        for key, values in extras.items():
            if values[i] is not None:
                aligned[key][i, at] = torch.as_tensor(values[i], dtype=torch.float32)
    return {"tokens": tokens, "mask": mask, **aligned}


def pack(lengths: list[int], budget: int, world: int) -> list[list[int]]:
    """Rows, sorted by length, into the fewest micro-batches of at most `budget` padded tokens, a multiple of `world` of them.

    Returns lists of row indices, `world` of them for each round, one a rank. All of them are as equal in padded size as
    sorted rows allow, and some may be empty. A row longer than the budget is alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def cut(cap: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for i in order:
            if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= cap:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    parts = cut(budget)
    count = math.ceil(max(len(parts), 1) / world) * world
    low, high = (
        1,
        max(budget, max(lengths, default=1)),
    )  # the smallest cap that still makes `count` micro-batches or fewer
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= count:
            high = middle
        else:
            low = middle + 1
    parts = cut(low)
    return parts + [[] for _ in range(count - len(parts))]
