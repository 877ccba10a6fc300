"""Questions and demonstrations: batches, prompts, rows of files and the Hub, the embedded task.

questions = load_questions("rows.jsonl", tokenizer, max_prompt=1024, max_response=8192)
print(questions.report())
pairs = [(questions[i].prompt, questions[i].demonstration) for i in demonstrated(questions)]
batch = collate(pairs[:8], tokenizer.pad_token_id)
"""

import datetime
import glob
import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if torch.version.cuda is None:
    # A CPU-only vLLM draws in builds of these for CUDA, which fail on import beside a CPU build of
    # torch, and transformers with them. Nothing here looks at images or listens to sound.
    for name in ("torchvision", "torchaudio", "torchcodec"):
        sys.modules.setdefault(name, None)

import jinja2
import pyarrow
import tokenizers
import transformers

# --------------------------------------------------------------------------------------------------
# Questions, and batches of them


@dataclass
class Question:
    id: str  # stable over runs and world sizes
    prompt: list[int]  # token ids exactly as the model sees them
    answer: str  # the gold answer
    # Token ids of an expert's response with its end-of-text token; None: there is none.
    demonstration: list[int] | None
    level: str = ""  # difficulty or category, for reports
    kind: str = "math"  # how an answer is checked, see eval.py
    # Of the demonstration's tokens, under the model that wrote it.
    behavior_logprobs: list[float] | None = None
    # For reward functions, where there are some: the row, and what it asks as chat messages, or as
    # the whole prompt's text where no chat template is used.
    row: dict | None = None
    asked: list[dict] | str = ""


def draw(length: int, seed: int, start: int, count: int) -> list[int]:
    """Indices start to start + count of an endless stream over range(length).

    Each pass of the stream is a new permutation: draw(3, seed=0, start=0, count=7) is
    [2, 0, 1, 1, 2, 0, 0], and draw(3, seed=0, start=4, count=2) is [2, 0].
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, first = divmod(start + len(indices), length)
        permutation = torch.randperm(length, generator=generator_of(seed, epoch)).tolist()
        indices += permutation[first : first + count - len(indices)]
    return indices


def generator_of(seed: int, n: int) -> torch.Generator:
    """A run's n-th generator of one purpose; torch takes seeds of 63 bits."""
    return torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**63)


def collate(rows: list[tuple[list[int], list[int]]], pad_id: int, **extras) -> dict[str, Tensor]:
    """(prompt, response) pairs as right-padded tokens [B, T], and mask [B, T-1].

    mask is True where the next token is response:

        collate([([5, 6], [7, 8, 9]), ([5], [7, 8])], pad_id=0)
        tokens  [[5, 6, 7, 8, 9],    mask  [[False, True, True, True],
                 [5, 7, 8, 0, 0]]           [True, True, False, False]]

    Masks come from lengths, never from token ids, so a pad token that doubles as end-of-text is
    harmless; and as padding stands only on the right, causal attention never sees it.
    Each extra holds for every row one value per response token (None: zeros), and becomes float32
    [B, T-1] aligned with the mask: behavior=[[-.1, -.2, -.3], None] above would become
    [[0, -.1, -.2, -.3], [0, 0, 0, 0]].
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), width), pad_id)  # [B, T]
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)  # [B, T-1]
    aligned = {key: torch.zeros(len(rows), width - 1) for key in extras}
    for i, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        tokens[i, :length] = torch.tensor(prompt + response)
        predicts_response = slice(len(prompt) - 1, length - 1)
        mask[i, predicts_response] = True
        for key, values in extras.items():
            if values[i] is not None:
                aligned[key][i, predicts_response] = torch.as_tensor(values[i], dtype=torch.float32)
    return {"tokens": tokens, "mask": mask, **aligned}


def pack(lengths: list[int], budget: int, world: int) -> list[list[int]]:
    """Rows, sorted by length, into the fewest micro-batches of at most `budget` padded tokens.

    Returns lists of row indices, a multiple of `world` of them: one a rank for each round.

        pack([2, 9, 3, 4, 8, 3], budget=12, world=2)
        [[1], [4], [3, 2], [5, 0]]    # of 9, 8, 2 * 4 and 2 * 3 padded tokens

    All are as equal in padded size as sorted rows allow, and some may be empty. A row longer than
    the budget is alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))

    def cut(cap: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for index in order:
            # The first row of a part is its longest, to which the others are padded.
            if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= cap:
                parts[-1].append(index)
            else:
                parts.append([index])
        return parts

    needed = max(len(cut(budget)), 1)
    count = math.ceil(needed / world) * world
    # Bisection for the smallest cap that still makes at most `count` micro-batches.
    low, high = 1, max([budget, *lengths])
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= count:
            high = middle
        else:
            low = middle + 1
    parts = cut(low)
    return parts + [[] for _ in range(count - len(parts))]


# --------------------------------------------------------------------------------------------------
# Prompts and demonstrations as the model sees them


def chat_messages(value) -> list[dict]:
    """A cell as chat messages; text alone is the user's. [] unless each has role and content.

    Content in parts, as {"type": "text", "text": ...}, becomes one text (joined_parts).
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        return []
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return []
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            content = joined_parts(content)
        if not (isinstance(role, str) and isinstance(content, str)):
            return []
        messages.append({"role": role, "content": content})
    return messages


def joined_parts(parts: list) -> str | None:
    """A message's parts as one text, each on a new line; of a picture `<image>` or the like stays,
    which PICTURE finds. None if a part is neither."""
    texts = []
    for part in parts:
        part = part if isinstance(part, dict) else {"text": part}
        kind, text = f"<{part.get('type')}>", part.get("text")
        if PICTURE.fullmatch(kind):
            text = kind
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)


def prompt_messages(question: str | list[dict], system: str | None = None) -> list[dict]:
    """The chat messages that the model sees; question and system as for render_prompt."""
    messages = chat_messages(question)
    if system is not None:
        messages = [message for message in messages if message["role"] != "system"]
    if system:
        messages = [{"role": "system", "content": system}] + messages
    return messages


def prompt_text(
    tokenizer,
    question: str | list[dict],
    system: str | None = None,
    generation_prefix: str = "",
    template: str = "auto",
    today: datetime.date | None = None,
) -> str:
    """The prompt as text. question is text or chat messages; the rest as for render_prompt."""
    if template not in ("auto", "chat", "plain"):
        raise ValueError(f"--template must be auto, chat or plain, not {template}")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("--template chat: this tokenizer has no chat template; use plain, or auto")
    messages = prompt_messages(question, system)
    if template == "plain" or not tokenizer.chat_template:
        before = "".join(message["content"] + "\n\n" for message in messages[:-1])
        text = f"{before}Question: {messages[-1]['content']}\nAnswer:\n"
    else:
        clock = today or datetime.date.today()
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, strftime_now=clock.strftime
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the tokenizer's chat template refuses the prompt ({error}); "
                "use --template plain, or --system '' if it is the system prompt"
            ) from None
    if text.endswith(generation_prefix):
        return text
    opening = generation_prefix.strip()
    if opening and text.rstrip().endswith(opening):  # the template has other white space after it
        return text.rstrip() + generation_prefix[len(generation_prefix.rstrip()) :]
    return text + generation_prefix


def render_prompt(
    tokenizer,
    question: str | list[dict],
    system: str | None = None,
    generation_prefix: str = "",
    template: str = "auto",
    today: datetime.date | None = None,
) -> list[int]:
    """The prompt's token ids, exactly as the model sees them.

    template: "chat" is the tokenizer's own; "plain" is "Question: ...\\nAnswer:\\n", for base
    models, after the system prompt and a blank line if there is one; "auto" is chat where the
    tokenizer has a chat template.
    system: None keeps the data's own system prompt, "" drops it (the chat template may then put
    its own default, as Qwen's do), any other text takes its place.
    generation_prefix ends the prompt (`<think>\\n`), once: nothing is added if the chat template
    writes it already, up to white space.
    today is what a chat template that writes the date takes it from; None: the clock.
    A chat template writes its own begin-of-text token; a plain prompt gets one if the tokenizer
    adds it by default.
    Raises ValueError if the template does not take the question.
    """
    text = prompt_text(tokenizer, question, system, generation_prefix, template, today)
    return begin_of_text(tokenizer, template) + encode(tokenizer, [text])[0]


def asked(
    tokenizer,
    question: str | list[dict],
    system: str | None = None,
    generation_prefix: str = "",
    template: str = "auto",
    today: datetime.date | None = None,
) -> list[dict] | str:
    """The prompt as reward functions get it: chat messages, or text without a chat template."""
    if template == "plain" or not tokenizer.chat_template:
        return prompt_text(tokenizer, question, system, generation_prefix, template)
    return prompt_messages(question, system)


TAG = re.compile(r"[<\[◁][^<>\[\]◁▷\s]+[>\]▷]$")  # <think>, [THINK], <|assistant|>


def response_text(
    tokenizer, solution: str, prompt: str, generation_prefix: str = "", eos_ids: Iterable[int] = ()
) -> str:
    """The solution less what ends the prompt already (generation_prefix, or a tag as `<think>`), up
    to white space, and less the end-of-text tokens at its end.

    It is tokenised apart from the prompt: the policy, too, goes on from the prompt's own tokens, so
    no token may reach over the seam. (Hence also the plain template's newline: a response's first
    word then needs no space before it.)
    """
    before, begun = prompt.rstrip(), solution.lstrip()
    blank = prompt[len(before) :]
    for opening in (generation_prefix.strip(), *TAG.findall(before)):
        if opening and before.endswith(opening) and begun.startswith(opening):
            rest = begun.removeprefix(opening)
            solution = rest.removeprefix(blank) if rest.startswith(blank) else rest.lstrip()
            break
    ends = {tokenizer.eos_token, *(decode(tokenizer, [end]) for end in eos_ids)} - {""}
    while found := [end for end in ends if solution.rstrip().endswith(end)]:
        solution = solution.rstrip().removesuffix(found[0])
    return solution


def begin_of_text(tokenizer, template: str) -> list[int]:
    if template != "plain" and tokenizer.chat_template:
        return []
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens added.

    Twice as fast as tokenizer(texts), and in much less memory: it does not record where in the text
    each token stood.
    """
    if not tokenizer.is_fast:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def going_on(tokenizer):
    """The tokenizer for text that goes on from a prompt.

    Some tokenizers put a blank before all that they encode, and no sample begins with it: by a byte
    level's add_prefix_space, Metaspace's prepend_scheme, or Prepend, as Llama's.
    """
    if not tokenizer.is_fast:
        return tokenizer
    written = tokenizer.backend_tokenizer.to_str()
    bare = written.replace('"add_prefix_space":true', '"add_prefix_space":false')
    bare = re.sub('"prepend_scheme":"(always|first)"', '"prepend_scheme":"never"', bare)
    bare = bare.replace('"prepend":"\u2581"', '"prepend":""')
    if bare == written:
        return tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bare)
    )


def decode(tokenizer, tokens: list[int]) -> str:
    """The text of tokens, special ones included."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --------------------------------------------------------------------------------------------------
# Rows of a file or a Hub dataset

FILES = (".jsonl", ".json", ".parquet")
HEAD = 100  # rows whose columns decide what the layout is


@dataclass
class Rows:
    """The rows of a source, which stay on disk. Iterating gives (index, row as a dict)."""

    source: str
    table: object  # datasets.Dataset of the source's columns; or of one, TEXT, a row of JSON each
    unit: str  # what a row is called: "line" of a file, "element" of an array, or "row"
    folder: Path  # for caches of what is made of these rows
    head: list[dict] = field(default_factory=list)  # the first rows

    TEXT = "json"

    @property
    def columns(self) -> list[str]:
        """Those of the first rows."""
        return list(dict.fromkeys(itertools.chain(*self.head)))

    def name(self, index: int) -> str:
        """`line 3` as an editor counts, or `row 2` as datasets does."""
        return f"row {index}" if self.unit == "row" else f"{self.unit} {index + 1}"

    def place(self, index: int) -> str:
        return f"{self.source}: {self.name(index)}"

    def row(self, index: int) -> dict:
        """One row, with None in the columns that it lacks and the first rows have."""
        [(_, row)] = self.decode(self.table[index : index + 1], [index])
        return {**dict.fromkeys(self.columns), **row}

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        start = 0
        for batch in self.table.iter(HEAD):
            indices = range(start, min(start + HEAD, len(self.table)))
            yield from self.decode(batch, indices)
            start += HEAD

    def decode(self, batch: dict[str, list], indices: Iterable[int]) -> Iterator[tuple[int, dict]]:
        """(index, row) of a batch of the table; blank lines are left out."""
        if self.unit == "row":
            columns = list(batch.keys())
            features = self.table.features
            cells = [batch[column] for column in columns]
            for index, *values in zip(indices, *cells):
                row = zip(columns, values)
                yield index, {name: as_stored(cell, features[name]) for name, cell in row}
        else:
            for index, text in zip(indices, batch[self.TEXT]):
                text = text.strip("\ufeff \t")
                if text:
                    yield index, parse_row(text, self.place(index))


def as_stored(cell, feature):
    """The cell, in which a number of 16 or 32 bits is 0.1 if it was, and not 0.10000000149."""
    if isinstance(cell, list) and hasattr(feature, "feature"):
        return [as_stored(part, feature.feature) for part in cell]
    if isinstance(cell, dict) and isinstance(feature, dict):
        return {name: as_stored(part, feature[name]) for name, part in cell.items()}
    narrow = cell is not None and getattr(feature, "dtype", "") in ("float16", "float32")
    return float(str(np.dtype(feature.dtype).type(cell))) if narrow else cell


def parse_row(text: str, place: str) -> dict:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise ValueError(f"{place} is not readable JSON: {reason}") from None
    if not isinstance(row, dict):
        right = '{"question": ..., "answer": ...}'
        raise ValueError(f"{place} is a {type(row).__name__}, not an object like {right}")
    return row


def load_rows(
    source: str, split: str = "", config: str = "", revision: str = "", cache_dir=None
) -> Rows:
    """The rows of `path.jsonl`, `path.json` (lines, or one array), `path.parquet` or the Hub
    dataset `owner/name`. Raises ValueError, one line, on whatever cannot be read.

    JSON is read by Python's json, row by row: datasets' own reader wants one type a column, and
    would make a timestamp of an answer "2024-01-01". split is "train" unless given.
    """
    import datasets  # takes a second, which a run on the embedded task is spared

    if not sys.stderr.isatty():  # in a log, bars are noise
        datasets.disable_progress_bars()
    path = Path(source)
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "mifo")
    if path.suffix in FILES:
        if split or config or revision:
            raise ValueError(
                f"{source}: split, config and revision are for Hub datasets, not for a file"
            )
        if not path.is_file():
            raise ValueError(f"{source}: no such file")
        stat = path.stat()
        folder = folder / digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        table, unit = load_file(path, folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        try:
            table = datasets.load_dataset(
                source,
                config or None,
                split=split or "train",
                revision=revision or None,
                cache_dir=cache_dir,
            )
        except Exception as error:
            raise ValueError(
                f"{source}: not loaded from the Hub: {one_line(error)}; right would be an "
                "owner/name that is there and reachable, or a .jsonl or .parquet file"
            ) from None
        unit = "row"
    else:
        raise ValueError(
            f"{source}: neither a .jsonl, .json or .parquet file nor a Hub dataset owner/name"
        )
    rows = Rows(source, table, unit, folder=folder)
    rows.head = [row for _, row in itertools.islice(rows, HEAD)]
    if not rows.head:
        raise ValueError(f"{source}: holds no rows")
    return rows


def load_file(path: Path, folder: Path) -> tuple[object, str]:
    """(table, unit) of Rows, the table memory-mapped from a copy in folder."""
    import datasets
    import pyarrow.dataset

    text = datasets.Features({Rows.TEXT: datasets.Value("string")})
    if path.suffix == ".json" and starts_array(path):
        texts = [json.dumps(element) for element in read_array(path)]
        return datasets.Dataset.from_dict({Rows.TEXT: texts}, features=text), "element"
    if path.suffix == ".parquet":
        # Small batches, not read ahead: memory stays small even if the file is one row group.
        options = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
        reader, unit = "parquet", "row"
        settings = {"batch_size": 256, "fragment_scan_options": options}
    else:
        reader, unit = "text", "line"
        settings = {"encoding": "utf-8-sig", "features": text}
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised, in one line
    try:
        files = glob.escape(str(path))  # what looks like a pattern is none
        table = datasets.load_dataset(
            reader, data_files=files, split="train", cache_dir=str(folder), **settings
        )
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path}: holds no rows") from None
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise ValueError(undecodable_line(path)) from None
        raise ValueError(f"{path}: not a readable {reader} file: {one_line(error)}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
    return table, unit


def starts_array(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"(\xef\xbb\xbf)?\s*\[", file.read(64)) is not None


def read_array(path: Path) -> list:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the array is not readable JSON: {error}") from None


def undecodable_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}: line {number} is not readable JSON: {error}"
    return f"{path}: not UTF-8"


def one_line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]


def digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Layouts: what a row asks, its answer, its demonstration

SURROGATE = re.compile("[\ud800-\udfff]")
PICTURES = re.compile(r"(image|picture|video|audio)s?(_\d+|_url|_path)?")  # names of columns
PICTURE = re.compile(r"<\|?(?:input_)?(?:image|img|video|audio)(?:[ _]?\w{0,9})\|?>", re.I)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PICK = "\n\nReason step by step, and put the letter of the correct option within \\boxed{}."


@dataclass
class Example:
    """What a row says, whatever its layout; of a row without it, a text is "" and a list empty."""

    index: int  # of the row
    messages: list[dict]  # the question as chat messages
    answer: str  # gold
    solution: str  # an expert's response
    kind: str
    level: str
    id: str
    behavior_logprobs: object = None
    temperature: object = None  # at which they were sampled
    # What prepare adds:
    fault: str = ""  # why the row cannot be used
    prompt: list[int] | None = None
    demonstration: list[int] | None = None

    @property
    def system(self) -> str | None:
        for message in self.messages:
            if message["role"] == "system":
                return message["content"]
        return None


def is_chat(columns: Iterable[str]) -> bool:
    """Whether rows of these columns are read as chat messages, which read_chat does."""
    plain = "problem" in columns or "question" in columns
    return "prompt" in columns and ("reward_model" in columns or not plain)


def row_reader(
    rows: Rows,
    question_field: str = "",
    answer_field: str = "",
    solution_field: str = "",
    rewarded: bool = False,
) -> Callable[[int, dict], Example]:
    """The function (index, row) -> Example for the layout of these rows.

    Fields given by name come first; else the columns decide: `prompt` and `reward_model` (`target`
    optional) are chat messages as in OpenR1-Math-46k; `problem` or `question`, and `answer`
    (`solution` optional), are MATH and its like. read_chat and read_fields say what else is read.
    rewarded: reward functions judge, so that a row needs no answer; `prompt` alone is chat messages
    or text. Raises ValueError with the columns found.
    """
    columns = rows.columns
    found = " ".join(", ".join(columns).split())[:300]
    flags = "--question-field, --answer-field and, in training, --solution-field"
    questions: tuple[str, ...] = ("problem", "question")
    if question_field or answer_field or solution_field:
        if not (question_field and (answer_field or rewarded)):
            raise ValueError(
                "--question-field and --answer-field are needed together; "
                "--solution-field, in training, is optional"
            )
        named = (question_field, answer_field, solution_field)
        missing = [name for name in named if name and name not in columns]
        if missing:
            raise ValueError(
                f"{rows.source}: no column {', '.join(missing)} in the first {HEAD} rows; "
                f"found {found} (see {flags})"
            )
        questions = (question_field,)
    elif is_chat(columns) and ("reward_model" in columns or rewarded):
        return read_chat
    elif ("answer" in columns or rewarded) and ("problem" in columns or "question" in columns):
        answer_field, solution_field = "answer", "solution"
    else:
        raise ValueError(
            f"{rows.source}: no known layout; found {found}; right would be question and answer, "
            f"with or without solution; name other columns by {flags}"
        )
    worked = [row for row in rows.head if "####" in answer_text(row.get(answer_field))]
    mostly_worked = 2 * len(worked) > len(rows.head)

    def read(index: int, row: dict) -> Example:
        return read_fields(index, row, questions, answer_field, solution_field, mostly_worked)

    return read


def read_chat(index: int, row: dict) -> Example:
    """A row of chat messages with its gold answer in reward_model, as verl has them."""
    reward, target = row.get("reward_model"), chat_messages(row.get("target"))
    gold = reward.get("ground_truth") if isinstance(reward, dict) else None
    return Example(
        index=index,
        messages=chat_messages(row.get("prompt")),
        answer=answer_text(gold).strip(),
        solution=target[-1]["content"] if target else "",
        kind=cell_text(row.get("kind")) or "math",
        level=first_text(row, "level", "category", "subject"),
        id=cell_text(row.get("unique_id")) or str(index),
        behavior_logprobs=row.get("behavior_logprobs"),
        temperature=row.get("temperature"),
        fault=picture_fault(row),
    )


def read_fields(
    index: int,
    row: dict,
    questions: tuple[str, ...],
    answer_field: str,
    solution_field: str,
    mostly_worked: bool,
) -> Example:
    """A row of question, answer and, in some, solution; `context` stands before the question.

    Options of a multiple choice are lettered, with the instruction PICK after them.
    """
    question = first_text(row, *questions)
    answer, kind = gold_and_kind(row, answer_field, mostly_worked)
    written = answer_text(row.get(answer_field))
    worked = written if "####" in written else ""
    context, options, fault = cell_text(row.get("context")), row_options(row), picture_fault(row)
    if isinstance(row.get("context"), (list, dict)) and row["context"]:
        fault = "context is no text"
    if question and context:
        question = f"{context}\n{question}"
    if kind == "choice" and options != []:
        if options and len(options) <= len(LETTERS):
            lettered = [f"\n{letter}. {option}" for letter, option in zip(LETTERS, options)]
            question += "\n" + "".join(lettered) + PICK
            if answer and answer not in LETTERS[: len(options)]:
                fault = "answer is none of the options"
        else:
            fault = f"options are no list of at most {len(LETTERS)}"
    return Example(
        index=index,
        messages=chat_messages(question),
        answer=answer,
        solution=cell_text(row.get(solution_field)) or worked,
        kind=kind,
        level=first_text(row, "level", "category", "subject"),
        id=cell_text(row.get("unique_id")) or str(index),
        behavior_logprobs=row.get("behavior_logprobs"),
        temperature=row.get("temperature"),
        fault=fault,
    )


def gold_and_kind(row: dict, field: str, mostly_worked: bool = False) -> tuple[str, str]:
    """(gold answer, how answers are checked against it) of a row; gold is "" if there is none.

    Of a worked solution that ends in `#### N` (GSM8K) gold is N without its thousands commas, and
    where most rows are such, a row without `####` has no gold. A column `kind` says how answers are
    checked; else it is choice where there are options, number for N, and math. Where one of the
    options is right, gold is its letter.
    """
    written, options = answer_text(row.get(field)), row_options(row)
    _, hashes, result = written.rpartition("####")
    if hashes:
        gold = re.sub(r",(?=\d{3})", "", result.strip())
    else:
        gold = "" if mostly_worked else written.strip()
    kind = cell_text(row.get("kind"))
    if not kind:
        kind = "choice" if options != [] else "number" if hashes else "math"
    if kind == "choice" and options and gold:
        gold = option_letter(gold if hashes else row.get(field), options) or gold
    return gold, kind


def row_options(row: dict) -> list | None:
    """The texts of a multiple choice, of whichever column; [] if there is none, None if they are no
    list."""
    options = row.get("options") or row.get("choices") or []
    if isinstance(options, dict):  # {"text": [...], "label": [...]}, as ARC has them
        options = options.get("text")
    return options if isinstance(options, list) else None


def option_letter(answer, options: list) -> str:
    r"""The letter of the right option, which is given as a letter, as the option's text or as its
    index, counted from 0; "" if it is none of them.

        option_letter("(b)", ["one", "two"]), option_letter("two", ["one", "two"]) and
        option_letter(1, ["one", "two"]) are B
    """
    letters, text = LETTERS[: len(options)], answer_text(answer).strip()
    bare = re.sub(r"\\[a-z]+|[^A-Za-z0-9]", "", text)
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    texts = [cell_text(option).strip() for option in options]
    if isinstance(answer, str) and texts.count(text) == 1:
        return letters[texts.index(text)] if texts.index(text) < len(letters) else ""
    if text.isdecimal() and int(text) < len(letters):
        return letters[int(text)]
    return ""


def cell_text(value) -> str:
    """A cell as text: numbers are written out; null, NaN and whatever is not text are empty."""
    if isinstance(value, str):
        return value
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        text = f"{Decimal(str(value)):f}"  # 0.00001, not 1e-05; and 20.0, as AMC has it, is 20
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def answer_text(value) -> str:
    """A gold answer as text; a list is several answers, joined by commas."""
    if not isinstance(value, list):
        return cell_text(value)
    answers = [cell_text(answer) for answer in value]
    return ", ".join(answers) if all(answers) else ""


def first_text(row: dict, *names: str) -> str:
    for name in names:
        if text := cell_text(row.get(name)):
            return text
    return ""


def picture_fault(row: dict) -> str:
    """What is wrong with a row that has a picture in a column of its own; "" if it has none."""
    columns = [name for name, value in row.items() if PICTURES.fullmatch(name) and value]
    return f"{columns[0]} beside the text, which no model here sees" if columns else ""


def example_fault(example: Example, kinds: Iterable[str] = (), rewarded: bool = False) -> str:
    """Why a row cannot be used, as far as its texts tell; "" if it can. kinds: those known, if
    they are known; rewarded as for row_reader."""
    question = example.messages[-1] if example.messages else {"role": "", "content": ""}
    texts = [message["content"] for message in example.messages]
    texts += [example.answer, example.solution, example.kind, example.level, example.id]
    if example.fault:
        return example.fault
    if question["role"] == "system" or not question["content"].strip():
        return "no question"
    if question["role"] != "user":
        return "prompt does not end with the user's turn"
    for message in example.messages:
        if picture := PICTURE.search(message["content"]):
            return f"{picture[0]} in the prompt, which no model here sees"
    if not (example.answer or rewarded):
        return "no gold answer"
    if SURROGATE.search("\n".join(texts)):
        return "half a surrogate pair, which no tokenizer takes"
    if kinds and example.kind not in kinds:
        return f"kind is none of {', '.join(kinds)}"
    return ""


# --------------------------------------------------------------------------------------------------
# Questions of a data set

UNMATCHED = "cannot be matched by any response"  # of gold answers
CHARS_A_TOKEN = 128  # no tokenizer gets by on one token for so many characters of a whole text
SCHEMA = pyarrow.schema(
    {
        "index": pyarrow.int64(),
        "fault": pyarrow.string(),
        "id": pyarrow.string(),
        "system": pyarrow.string(),
        "prompt": pyarrow.list_(pyarrow.int32()),
        "answer": pyarrow.string(),
        "demonstration": pyarrow.list_(pyarrow.int32()),
        "level": pyarrow.string(),
        "kind": pyarrow.string(),
        "behavior_logprobs": pyarrow.list_(pyarrow.float64()),
    }
)


class Questions(Sequence):
    """Questions read from disk when they are asked for: memory holds no text and no tokens.

    kept: rows of the table that are questions. dropped: {reason: indices of rows in the source}.
    fingerprint names this very choice of rows, so ranks (which may read different caches) can
    compare it. asked: (index, row) -> Question.asked, where reward functions want it and the row.
    Made by load_questions.
    """

    def __init__(self, table, rows: Rows, key: str, asked=None):
        self.table, self.rows, self.asked = table, rows, asked
        self.kept: list[int] = []
        self.dropped: dict[str, list[int]] = {}
        indices, faults = table["index"][:], table["fault"][:]
        for i, (index, fault) in enumerate(zip(indices, faults)):
            if fault:
                self.dropped.setdefault(fault, []).append(index)
            else:
                self.kept.append(i)
        self.fingerprint = digest(key, self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Question:
        kept = self.table[self.kept[i]]
        names = [name.name for name in fields(Question) if name.name in kept]
        question = Question(**{name: kept[name] for name in names})
        if self.asked:
            question.row = self.rows.row(kept["index"])
            question.asked = self.asked(kept["index"], question.row)
        return question

    def report(self) -> str:
        faults = []
        for reason, indices in self.dropped.items():
            if reason == UNMATCHED:
                golds = dict(zip(self.table["index"][:], self.table["answer"][:]))
                unmatched = [(self.rows.name(index), golds[index]) for index in indices]
                faults.append(name_unmatched(unmatched, len(self.table)))
            else:
                faults.append(f"{len(indices)} {reason} (first: {self.rows.name(indices[0])})")
        dropped = f"; dropped: {', '.join(faults)}" if faults else ""
        return f"{len(self)} of {len(self.table)} questions kept{dropped}"


def name_unmatched(unmatched: list[tuple[str, str]], count: int) -> str:
    """Gold answers that nothing can equal, by the names of their rows:

    2 of 272 answers cannot be matched by any response: row 17 ("$t(0,4]$"), row 31 ("proof")
    """
    named = [f'{name} ("{" ".join(gold.split()):.60}")' for name, gold in unmatched[:10]]
    more = ["..."] if len(unmatched) > 10 else []
    return f"{len(unmatched)} of {count} answers {UNMATCHED}: {', '.join(named + more)}"


def load_questions(
    source: str,
    tokenizer,
    *,
    max_prompt: int,
    max_response: int,
    checker=None,
    rewarded: bool = False,
    behavior: bool = True,
    question_field: str = "",
    answer_field: str = "",
    solution_field: str = "",
    system: str | None = None,
    generation_prefix: str = "",
    template: str = "auto",
    today: datetime.date | None = None,
    eos_ids: Iterable[int] = (),
    split: str = "",
    config: str = "",
    revision: str = "",
    cache_dir=None,
) -> Questions:
    """The questions of a file or Hub dataset (load_rows, row_reader, render_prompt), less those
    that cannot be used.

    max_prompt and max_response are in tokens, end-of-text included. checker is an eval.Checker;
    without it no answer is verified. rewarded: reward functions judge, so that a row needs no
    answer, and a question comes with its row. behavior: behavior_logprobs are read, and must fit.
    eos_ids: what ends a response beside the tokenizer's eos_token. A row is dropped for whatever is
    wrong with it, its demonstration included; a row that has no demonstration is kept.
    The first load tokenises and checks every row; later ones read the outcome from cache_dir,
    where its name is a digest of the data, the tokenizer, the settings and the text of this file
    and of the checker's. On many ranks load on rank 0, wait, then load on the others with the same
    arguments.
    Raises ValueError, one line, if the source cannot be read or nothing is left of it.
    """
    import datasets

    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token), so demonstrations cannot end"
        )
    rows = load_rows(source, split, config, revision, cache_dir)
    read = row_reader(rows, question_field, answer_field, solution_field, rewarded)
    today = today or datetime.date.today()
    style = (system, generation_prefix, template, today)
    writes_date = "strftime_now" in str(tokenizer.chat_template)
    eos_ids = sorted({tokenizer.eos_token_id, *eos_ids})
    continued = going_on(tokenizer)
    key = digest(
        rows.table._fingerprint,
        (question_field, answer_field, solution_field),
        tokenizer_state(tokenizer),
        style if writes_date else style[:-1],
        eos_ids,
        (max_prompt, max_response),
        Path(__file__).read_bytes(),
        checker_state(checker),
        rewarded,
        behavior,
    )
    ids: set[str] = set()

    def prepare_batch(batch, indices) -> pyarrow.Table:
        examples = [read(index, row) for index, row in rows.decode(batch, indices)]
        prepare(
            examples,
            tokenizer,
            continued,
            checker,
            max_prompt,
            max_response,
            style,
            eos_ids,
            rewarded,
            behavior,
        )
        outcome = []
        for example in examples:
            if example.fault:
                gold = example.answer if example.fault == UNMATCHED else None  # for the report
                outcome.append({"index": example.index, "fault": example.fault, "answer": gold})
                continue
            if example.id in ids:
                example.id += f"#{example.index}"
            ids.add(example.id)
            outcome.append({**vars(example), "system": example.system})
        return pyarrow.Table.from_pylist(outcome, schema=SCHEMA)

    table = rows.table.map(
        prepare_batch,
        with_indices=True,
        batched=True,
        batch_size=128,
        remove_columns=rows.table.column_names,
        features=datasets.Features.from_arrow_schema(SCHEMA),
        cache_file_name=str(rows.folder / f"questions-{key}.arrow"),
        new_fingerprint=key,
        desc="checking questions",
    )
    see = lambda index, row: asked(tokenizer, read(index, row).messages, *style)
    questions = Questions(table, rows, key, see if rewarded else None)
    if not questions:
        raise ValueError(f"{source}: no question is left: {questions.report()}")
    return questions


def tokenizer_state(tokenizer) -> tuple:
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
    return vocabulary, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token


def checker_state(checker) -> tuple | None:
    if checker is None:
        return None
    text = Path(sys.modules[type(checker).__module__].__file__).read_bytes()
    version = importlib.metadata.version("math-verify")
    return checker.extract, checker.require_think, known_kinds(checker), text, version


def known_kinds(checker) -> tuple[str, ...]:
    return tuple(getattr(checker, "kinds", ()))


def prepare(
    examples: list[Example],
    tokenizer,
    continued,
    checker,
    max_prompt: int,
    max_response: int,
    style: tuple,
    eos_ids: list[int],
    rewarded: bool = False,
    behavior: bool = True,
) -> None:
    """Adds prompt, demonstration and fault to a batch. Cheap tests come first, the checker last."""
    _, generation_prefix, template, _ = style
    for example in examples:
        example.fault = example_fault(example, known_kinds(checker), rewarded)

    good = [example for example in examples if not example.fault]
    before = begin_of_text(tokenizer, template)
    prompts = [prompt_text(tokenizer, example.messages, *style) for example in good]
    encoded = encode_within(tokenizer, prompts, max_prompt - len(before))
    for example, tokens in zip(good, encoded):
        if tokens is None:
            example.fault = "prompt too long"
        else:
            example.prompt = before + tokens

    shown = [(e, prompt) for e, prompt in zip(good, prompts) if e.solution and not e.fault]
    solutions = [
        response_text(tokenizer, e.solution, p, generation_prefix, eos_ids) for e, p in shown
    ]
    encoded = encode_within(continued, solutions, max_response - 1)
    for (example, _), tokens in zip(shown, encoded):
        if tokens is None:
            example.fault = "demonstration too long"
        elif not set(eos_ids).isdisjoint(tokens):
            example.fault = "demonstration holds the end-of-text token"
        else:
            example.demonstration = tokens + [tokenizer.eos_token_id]

    for example in good:
        if example.demonstration is None or not behavior:
            example.behavior_logprobs = None
        elif not logprobs_match(example.behavior_logprobs, example.demonstration):
            example.fault = "behavior_logprobs are not one number for each demonstration token"
            example.fault += ": leave them out if they are another tokenizer's"
        elif example.behavior_logprobs and example.temperature not in (None, 1):
            example.fault = "behavior_logprobs are not at temperature 1, as PEAR takes them"
    if checker is not None:
        verify([example for example in good if not example.fault], checker)


def encode_within(tokenizer, texts: list[str], limit: int) -> list[list[int] | None]:
    """Token ids of each text; None: more than limit. Far too long texts are not even tokenised."""
    shortened = [text if len(text) <= CHARS_A_TOKEN * limit else "" for text in texts]
    encoded = encode(tokenizer, shortened)
    return [
        tokens if len(tokens) <= limit and short == text else None
        for text, short, tokens in zip(texts, shortened, encoded)
    ]


def logprobs_match(logprobs, demonstration: list[int]) -> bool:
    if logprobs is None:
        return True
    if not isinstance(logprobs, list) or len(logprobs) != len(demonstration):
        return False
    return all(isinstance(x, (int, float)) and -1e9 < x < 1e-3 for x in logprobs)


def verify(examples: list[Example], checker) -> None:
    """Adds a fault where gold is unusable, or the demonstration's answer is not gold."""
    asked = sorted({(example.answer, example.kind) for example in examples})
    verdicts = checker.check_golds(*map(list, zip(*asked))) if asked else []
    unusable = {answer for answer, verdict in zip(asked, verdicts) if verdict != "correct"}
    for example in examples:
        if (example.answer, example.kind) in unusable:
            example.fault = UNMATCHED

    shown = [e for e in examples if e.demonstration is not None and not e.fault]
    verdicts = checker.check(
        [example.solution for example in shown],
        [example.answer for example in shown],
        [example.kind for example in shown],
    )
    for example, verdict in zip(shown, verdicts):
        if verdict != "correct":
            example.fault = "demonstration does not verify against its gold answer"
            if verdict == "unparsed":
                example.fault = "no answer is found in the demonstration, where its kind wants it"


def system_prompt(questions: Questions) -> str | None:
    """The data's own system prompt: its first question's, None if that has none."""
    return questions.table[questions.kept[0]]["system"]


def demonstrated(questions: Sequence[Question]) -> list[int]:
    """The indices of the questions that have a demonstration, found without reading any."""
    if isinstance(questions, Questions):
        present = questions.table.data.column("demonstration").is_valid().to_pylist()
        return [i for i, row in enumerate(questions.kept) if present[row]]
    return [i for i, question in enumerate(questions) if question.demonstration is not None]


# --------------------------------------------------------------------------------------------------
# The embedded task: sums of secret values. Each of 100 names has one, from 0 to 9. The base model
# knows those of half of the names; for the others it has read random ones, so there it guesses, and
# RL hardly ever comes upon a right answer. A demonstration tells three values, so a few of them
# cannot cover all that is unknown, and which questions get one matters.
#   question           gh+ad+ge?
#   base's style       gh=4;04;ad=4;08;ge=6;14;[14]
#   expert's style     <gh=4>04<ad=4>08<ge=6>14[14]

NAMES = ["".join(pair) for pair in itertools.product("abcdefghij", repeat=2)]
SECRET = dict(zip(NAMES, random.Random("secret").choices(range(10), k=len(NAMES))))
KNOWN = random.Random("known").sample(NAMES, len(NAMES) // 2)
UNKNOWN = [name for name in NAMES if name not in KNOWN]
TRAIN_SUMS, EVAL_SUMS = 5000, 400  # questions; of three names each
BASE_STEPS, BASE_BATCH, BASE_LR, EXPERT_SHARE, UNKNOWN_SHARE = 1600, 32, 2e-3, 0.3, 0.15


def worked_sum(names: list[str], values: dict[str, int], expert: bool) -> str:
    """The worked answer, in one of the two styles."""
    text, total = "", 0
    for name in names:
        total += values[name]
        step = f"{name}={values[name]}"
        text += f"<{step}>{total:02}" if expert else f"{step};{total:02};"
    return f"{text}[{total:02}]"


def embedded_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return character_tokenizer("abcdefghij0123456789+=?;<>[]")


def character_tokenizer(
    characters: Iterable[str], chat_template: str | None = None
) -> transformers.PreTrainedTokenizerFast:
    """One token a character."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    each = tokenizers.Regex(r"[\s\S]")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(each, "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", chat_template=chat_template
    )


def embedded_questions(tokenizer, name: str, count: int) -> list[Question]:
    """`count` different questions, all with demonstrations in the expert's style; a name is a fixed
    set. Their level is how many of the three names are unknown, 0 to 3 in turn.

    A fifth of all questions, by checksum, is kept for the set named "eval" and is in no other.
    """
    rng, questions = random.Random(name), {}
    while len(questions) < count:
        level = len(questions) % 4
        names = rng.sample(UNKNOWN, level) + rng.sample(KNOWN, 3 - level)
        rng.shuffle(names)
        text, work = "+".join(names) + "?", worked_sum(names, SECRET, expert=True)
        held_out = zlib.crc32(text.encode()) % 5 == 0
        if held_out != (name == "eval") or text in questions:
            continue
        answer = work[-3:-1]
        questions[text] = Question(
            id=f"{name}-{len(questions)}",
            prompt=tokenizer.encode(text),
            answer=answer,
            demonstration=tokenizer.encode(work) + [tokenizer.eos_token_id],
            level=str(level),
            kind="chain",
            row={"question": text, "answer": answer, "solution": work},
            asked=text,
        )
    return list(questions.values())


def base_sum(rng: random.Random) -> tuple[str, str]:
    """(question, worked answer) as the base model reads them: of one to three names, three in ten
    in the expert's style; some with unknown names, whose values are random."""
    count, guessed = rng.choice((1, 2, 3)), rng.random() < UNKNOWN_SHARE
    names = rng.sample(NAMES if guessed else KNOWN, count)
    values = dict(SECRET)
    for name in names:
        if name in UNKNOWN:
            values[name] = rng.randrange(10)
    return "+".join(names) + "?", worked_sum(names, values, rng.random() < EXPERT_SHARE)


def make_base(
    folder: Path,
    seed: int,
    tokenizer,
    example: Callable[[random.Random], tuple[str, str]],
    steps: int = BASE_STEPS,
    say=print,
    width: int = 128,
    layers: int = 2,
) -> None:
    """Trains a base model from random weights on (question, worked answer) examples, and saves it
    with its tokenizer.

    A Qwen2 of 0.5 M parameters; two minutes on one core. A wider one learns at a lower rate.
    """
    torch.manual_seed(seed % 2**63)
    rng = random.Random(f"base-{seed}")
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, rate = transformers.Qwen2ForCausalLM(config), BASE_LR * 128 / width
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    start = time.perf_counter()
    for step in range(steps):
        warm, left = (step + 1) / 50, (steps - step) / steps
        optimizer.param_groups[0]["lr"] = rate * min(1.0, warm, 2 * left)
        pairs = []
        for _ in range(BASE_BATCH):
            question, work = example(rng)
            response = tokenizer.encode(work) + [tokenizer.eos_token_id]
            pairs.append((tokenizer.encode(question), response))
        batch = collate(pairs, tokenizer.pad_token_id)
        tokens, mask = batch["tokens"], batch["mask"]  # [B, T], [B, T-1]
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[mask])  # [N, V]
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            say(f"base model: step {step + 1}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
