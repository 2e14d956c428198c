"""Chats in the forms of other trainers -> ChatML.

ms-swift    `<audio>` tags in the texts, and an `audios` list
OpenAI      `input_audio` and `audio_url` parts
ShareGPT    `conversations` of from / value
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from common import DataError
from prepare.manifest import parts_of, shown
from prepare.rows import Origin, Row, audio_part, is_absent

ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
RECORD_KEYS = ("messages", "start_index", "speaker", "misc")
TURN_KEYS = ("role", "content", "recipient")
LOSS_KEYS = ("loss", "weight")  # by which ms-swift and OpenAI mark turns that do not train
FOREIGN_KEYS = ("audio", "path", "url")  # of audio parts


def chat_key(value: dict) -> str | None:
    return next((key for key in ("messages", "conversations", "conversation") if key in value), None)


def is_chatml(value: dict) -> bool:
    """Whether a chat has no sign of another form. A broken record has none: its reader names what is wrong."""
    if chat_key(value) != "messages" or any(name in value for name in ("audios", "audio", "system")):
        return False
    if not isinstance(value["messages"], list):
        return True
    for turn in value["messages"]:
        if not isinstance(turn, dict):
            continue
        if set(turn) - set(TURN_KEYS) or _plain_role(turn.get("role")) != turn.get("role"):
            return False
        content = turn.get("content")
        if any(_is_foreign(part) for part in parts_of(content)):
            return False
    return True


def from_chat(value: Any, origin: Origin) -> dict:
    """The ChatML record of a chat. raises: DataError"""
    key = chat_key(value) if isinstance(value, dict) else None
    if key is None or not isinstance(value[key], list) or not all(isinstance(turn, dict) for turn in value[key]):
        raise DataError(f"{origin.source}: messages: expected a list of turns, found {shown(value)}")
    audios = value.get("audios") or value.get("audio") or []
    audios = list(audios) if isinstance(audios, list) else [audios]
    if row := _as_row(value, value[key], audios):
        origin.repairs["a clip with its transcript became the answer to it, phrased as inference does"] += 1
        record = Row(row, origin).record()
        misc = record.pop("misc", {}) | _misc_of(value, {*RECORD_KEYS, key, "audios", "audio", "system"}, origin)
        return record | ({"misc": misc} if misc else {})
    clips = [audio_part(audio, f"{origin.source}: audios[{i}]", origin) for i, audio in enumerate(audios)]
    turns = _single_turns(value[key], origin.repairs)
    start = _first_that_trains(turns, value.get("start_index"), f"{origin.source}: {key}", origin.repairs)
    messages = [_turn(turn, f"{origin.source}: {key}[{i}]", origin) for i, turn in enumerate(turns)]
    if isinstance(value.get("system"), str):
        messages.insert(0, {"role": "system", "content": value["system"]})
        origin.repairs["`system` beside the messages became a system turn"] += 1
    if clips:
        messages = _place_clips(messages, clips, origin)
    num_inserted = len(messages) - len(turns)  # all of them before the first turn that trains
    if num_inserted and type(start) in (int, float):
        start += num_inserted
    record: dict[str, Any] = {"messages": messages}
    record |= {name: v for name, v in (("start_index", start), ("speaker", value.get("speaker"))) if not is_absent(v)}
    misc = _misc_of(value, {*RECORD_KEYS, key, "audios", "audio", "system"}, origin)
    return record | ({"misc": misc} if misc else {})


def _is_foreign(part: Any) -> bool:
    """Whether a content part names its audio in the way of another form."""
    if not isinstance(part, dict):
        return False
    kind, is_named = part.get("type"), "audio_url" in part or "raw_audio" in part
    return kind in ("input_audio", "audio_url") or (kind == "audio" and not is_named and any(k in part for k in FOREIGN_KEYS))


def _plain_role(role: Any) -> Any:
    if not isinstance(role, str):
        return role
    lowered = role.strip().lower()
    return ROLE_NAMES.get(lowered, lowered)


def _misc_of(value: dict, known: set[str], origin: Origin) -> dict:
    """`misc`, and the simple values of unknown keys."""
    extra = {name: v for name, v in value.items() if name not in known and not is_absent(v) and v not in ([], {})}
    if any(extra.get(name) for name in ("images", "videos")):
        raise DataError(f"{origin.source}: this model does not read images and videos; leave the record out")
    misc = {} if is_absent(value.get("misc")) else value["misc"]
    if not isinstance(misc, dict):
        raise DataError(f"{origin.source}: misc: expected an object, found {shown(misc)}")
    kept = {name: v for name, v in extra.items() if isinstance(v, (str, int, float))}
    origin.repairs.update(f"`{name}` was left out" for name in extra if name not in kept)
    origin.repairs.update(f"`{name}` went to `misc`" for name in kept)
    return misc | kept


def _as_row(value: dict, turns: Sequence[dict], audios: list) -> dict | None:
    """A row, for a chat that is no more than one clip and its transcript, `<audio>text`, perhaps after a system turn."""
    roles = [_plain_role(turn.get("role", turn.get("from"))) for turn in turns]
    contents = [turn.get("content", turn.get("value")) for turn in turns]
    systems = [text for text in (value.get("system"), *contents[:-1]) if isinstance(text, str)]
    if len(audios) != 1 or roles[-1:] != ["assistant"] or set(roles[:-1]) - {"system"} or len(systems) > 1:
        return None
    if not all(isinstance(text, str) for text in contents) or any(turns[-1].get(key) in (False, 0) for key in LOSS_KEYS):
        return None
    text = contents[-1].replace("<audio>", "", 1).strip()
    row = {"audio": audios[0], "text": text, "speaker": value.get("speaker")} | ({"system": systems[0]} if systems else {})
    return row if text and "<audio>" not in text else None


def _single_turns(turns: Sequence[dict], repairs: Counter) -> list[dict]:
    """One object for each turn, also where an object holds a question and its answer."""
    single = []
    for turn in turns:
        if set(turn) == {"human", "assistant"}:
            repairs["human / assistant pairs became turns"] += 1
            single += [{"role": role, "content": turn[name]} for role, name in (("user", "human"), ("assistant", "assistant"))]
        else:
            single.append(turn)
    return single


def _first_that_trains(turns: Sequence[dict], start: Any, where: str, repairs: Counter) -> Any:
    """`start_index`, after the turns whose `loss` is off; an impossible value is left to the parser."""
    is_answer = [_plain_role(turn.get("role", turn.get("from"))) == "assistant" for turn in turns]
    is_off = [any(turn.get(key) in (False, 0) for key in LOSS_KEYS) for turn in turns]
    off = [i for i in range(len(turns)) if is_answer[i] and is_off[i]]
    if not off:
        return start
    for i in range(off[-1]):
        if is_answer[i] and not is_off[i]:
            raise DataError(
                f"{where}[{off[-1]}]: `loss` is off here but not in turn {i}; only the beginning of a record can be left out "
                "of the loss: split the record"
            )
    repairs["turns whose `loss` is off stand before `start_index` now"] += len(off)
    return max(off[-1] + 1, start if isinstance(start, int) else 0)


def _turn(turn: dict, where: str, origin: Origin) -> dict:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if "role" not in turn and "from" in turn:
        origin.repairs["from / value became role / content"] += 1
    plain = _plain_role(role)
    if plain != role:
        origin.repairs[f"role {shown(role)} became {shown(plain)}"] += 1
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{i}]", origin) for i, part in enumerate(content)]
    elif isinstance(content, dict):
        content = _part(content, f"{where}.content", origin)
    known = ("role", "content", *(("from", "value") if "from" in turn else ()), *LOSS_KEYS)
    rest = {name: v for name, v in turn.items() if name not in known and not is_absent(v) and v not in ([], {})}
    return {"role": plain, "content": content} | rest  # the parser names unknown keys


def _part(part: Any, where: str, origin: Origin) -> Any:
    """A content part in ChatML; one that is ChatML already, or unknown, is left as it is."""
    if not _is_foreign(part):
        return part
    kind = part["type"]
    value = next((part[key] for key in (kind, *FOREIGN_KEYS) if part.get(key)), None)
    origin.repairs[f"`{kind}` parts became audio parts"] += 1
    timing = {name: part[name] for name in ("offset", "duration") if not is_absent(part.get(name))}
    return audio_part(value, where, origin) | timing


def _place_clips(messages: list[dict], clips: list[dict], origin: Origin) -> list[dict]:
    """Put the clips of an `audios` list where the `<audio>` tags are."""
    num_tags = sum(text.count("<audio>") for turn in messages for text in _texts(turn["content"]))
    if num_tags == 0 and len(clips) == 1:
        return _place_single_clip(messages, clips[0], origin)
    if num_tags != len(clips):
        problem = f"{num_tags} <audio> tags but {len(clips)} audios; each clip needs the tag that says where"
        raise DataError(f"{origin.source}: {problem}")
    left = iter(clips)
    origin.repairs["`<audio>` tags became audio parts"] += num_tags
    contents = [_bare(turn, messages[i - 1] if i else {}, f"{origin.source}: turn {i}") for i, turn in enumerate(messages)]
    return [turn | {"content": _replace_tags(content, left)} for turn, content in zip(messages, contents)]


def _bare(turn: dict, before: dict, where: str) -> Any:
    """A turn's content; of the assistant's `<audio>text` the clip alone where the user's turn has the words. raises: DataError"""
    content = turn["content"]
    words = content.partition("<audio>")[2].strip() if isinstance(content, str) and turn["role"] == "assistant" else ""
    if not content or not words or not content.lstrip().startswith("<audio>"):
        return content
    if before.get("role") == "user" and words in "".join(_texts(before["content"])):
        return "<audio>"
    problem = f"a clip and then {shown(words)}, which would be trained as words after the clip"
    raise DataError(f"{where}: {problem}; if it is the clip's transcript, make it the user's turn, else take it out")


def _place_single_clip(messages: list[dict], clip: dict, origin: Origin) -> list[dict]:
    """One clip without a tag: its place is clear if the last turn is the assistant's and has no other words."""
    *before, last = messages or [{"role": None, "content": None}]
    answer = last["content"] if last["role"] == "assistant" and isinstance(last["content"], str) else None
    asked = before[-1]["content"] if before and before[-1]["role"] == "user" else None
    if answer is not None and answer.strip() in ("", asked.strip() if isinstance(asked, str) else ""):
        origin.repairs["the clip became the assistant's turn, which had no words of its own"] += 1
        return [*before, last | {"content": clip}]
    raise DataError(f"{origin.source}: an audio but no <audio> tag; write <audio> where the clip belongs")


def _texts(content: Any) -> list[str]:
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts_of(content)]
    return [text for text in texts if isinstance(text, str)]


def _replace_tags(content: Any, clips: Iterator[dict]) -> Any:
    if isinstance(content, list):
        replaced = [_replace_tags(part, clips) for part in content]
        return [part for group in replaced for part in (group if isinstance(group, list) else [group])]
    text = content.get("text") if isinstance(content, dict) else content
    if not isinstance(text, str) or "<audio>" not in text:
        return content
    parts: list[dict] = []
    for number, piece in enumerate(text.split("<audio>")):
        parts += [next(clips)] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts if len(parts) > 1 else parts[0]
