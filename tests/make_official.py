"""Writes golden/official.json: what upstream's examples/generation.py makes of requests and of texts.

    python tests/make_official.py higgs-audio/examples/generation.py

The file is a script, not part of the package, and imports much that is not needed here. So its pure functions are taken out of
it, and the statements of its `main` that normalise a text. Made from boson-ai/higgs-audio@f04f5df.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from boson_multimodal.data_types import AudioContent, Message, TextContent

REQUESTS = [  # (names of reference clips or None, in the system turn, scene or None, text)
    (None, False, None, "Hello there."),
    (None, False, "Audio is recorded from a quiet room.", "Hello there."),
    (None, False, None, "[SPEAKER0] Hello.\n[SPEAKER1] Bye."),
    (None, False, "A busy street.", "[SPEAKER1] Hello.\n[SPEAKER0] Bye.\n[SPEAKER2] No."),
    (None, False, None, "[SPEAKER0] Hello."),
    ("anna", False, None, "Hello there."),
    ("anna", False, "A busy street.", "Hello there."),
    ("anna,ben", False, None, "[SPEAKER0] Hello.\n[SPEAKER1] Bye."),
    ("anna,ben", False, "A busy street.", "[SPEAKER0] Hello.\n[SPEAKER1] Bye."),
    ("anna", True, None, "Hello there."),
    ("anna", True, "A busy street.", "Hello there."),
    ("anna,ben", True, None, "[SPEAKER0] Hello.\n[SPEAKER1] Bye."),
    ("anna,ben", True, "A busy street.", "[SPEAKER0] Hello.\n[SPEAKER1] Bye."),
    ("profile:old", False, None, "Hello there."),
    ("profile:old", False, "A busy street.", "Hello there."),
    ("anna,profile:old", False, None, "[SPEAKER0] Hello.\n[SPEAKER1] Bye."),
    ("profile:old,anna", False, "A busy street.", "[SPEAKER0] Hello.\n[SPEAKER1] Bye."),
]
TEXTS = [
    *("", " ", "hello", "Hello.", "Wait,", "Why?", "no!", "so;", 'He said "no"', "the dogs'", "a: b:", "dash -", "...", "(a)"),
    *(
        "，。：；？！（）【】《》“”‘’、—…·「」『』",
        "你好，世界。",
        "你好 世界",
        "“引号”",
        "《书》",
        "等等…",
        "é à ü",
        "ﬁ ligature",
        "a\u00a0b",
    ),
    *(
        "It is 20°C (68°F) outside",
        "20 °C",
        "[laugh]",
        "Ha [laugh] ha",
        "[humming start] la [humming end]",
        "[music]",
        "x[cough]",
    ),
    *(
        "[music start] [music end]",
        "[sing start] la la [sing end]",
        "[applause] [cheering]",
        "[Laugh]",
        "[laughs]",
        "【laugh】",
    ),
    *(
        "two  blanks\tand tab",
        "a\n\n\nb\n",
        "  a \n  \n b  ",
        "a\r\nb",
        "[SPEAKER0] Hi\n[SPEAKER1] Bye",
        "tab\u3000wide",
        "a\u2028b",
    ),
    *(
        "ends with a quote”",
        "ends 』",
        "<SE>[Laughter]</SE>",
        "ellipsis…",
        "3.14",
        "a/b & c",
        "100%",
        "(nested (one))",
        "((",
        "·",
    ),
]


def main(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    profiles = {"profiles": {"old": "Male, an old voice."}}
    names: dict = {"Message": Message, "TextContent": TextContent, "AudioContent": AudioContent}
    names |= {"os": __import__("os"), "re": __import__("re"), "yaml": SimpleNamespace(safe_load=lambda _: profiles)}
    wanted = ("normalize_chinese_punctuation", "_build_system_message_with_audio_prompt", "prepare_generation_context")
    constants = ("AUDIO_PLACEHOLDER_TOKEN", "MULTISPEAKER_DEFAULT_SYSTEM_MESSAGE")
    body = [node for node in tree.body if getattr(node, "name", "") in wanted]
    body += [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id in constants]
    exec(compile(ast.Module(body, []), path, "exec"), names)
    statements = next(node for node in tree.body if getattr(node, "name", "") == "main").body
    touched = [i for i, node in enumerate(statements) if ast.unparse(node).startswith("transcript = normalize_chinese")]
    last = next(i for i, node in enumerate(statements) if ast.unparse(node).startswith("if not any("))
    normalise = compile(ast.Module(statements[touched[0] : last + 1], []), path, "exec")

    def normalised(text: str) -> str:
        scope = names | {"transcript": text}
        exec(normalise, scope)
        return scope["transcript"]

    with tempfile.TemporaryDirectory() as folder:
        names["CURR_DIR"] = folder
        prompts = Path(folder) / "voice_prompts"
        prompts.mkdir()
        for name in ("anna", "ben"):
            (prompts / f"{name}.wav").touch()
            (prompts / f"{name}.txt").write_text(f"This is {name}.\n")
        (prompts / "profile.yaml").touch()
        contexts = [context(names, *request) for request in REQUESTS]
    requests = [
        {"voices": voices, "in_system": in_system, "scene": scene, "text": text, "turns": turns}
        for (voices, in_system, scene, text), turns in zip(REQUESTS, contexts)
    ]
    golden = {"requests": requests, "texts": [[text, normalised(text)] for text in TEXTS]}
    target = Path(__file__).parent / "golden" / "official.json"
    lines = {name: [json.dumps(item, ensure_ascii=False) for item in items] for name, items in golden.items()}
    blocks = (f'"{name}": [\n' + ",\n".join(items) + "\n]" for name, items in lines.items())
    target.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def context(names: dict, voices: str | None, in_system: bool, scene: str | None, text: str) -> list[list]:
    """[role, texts and, for clips, null] of each turn."""
    codec = SimpleNamespace(encode=lambda _: None)
    tags = sorted(set(names["re"].findall(r"\[(SPEAKER\d+)\]", text)))
    messages, _ = names["prepare_generation_context"](scene, voices, in_system, codec, tags)
    return [[message.role, parts(message.content)] for message in messages]


def parts(content) -> list:
    contents = content if isinstance(content, list) else [content]
    return [part if isinstance(part, str) else getattr(part, "text", None) for part in contents]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
