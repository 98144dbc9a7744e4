#!/usr/bin/env python3
"""Makes tests/data/text: awkward strings, two small tokenizers, and the ids that the `tokenizers` library gives.

Needs the PyPI packages tokenizers and gguf, and the files that tools/fetch_tokenizers and tools/fetch_smollm2 put into the cache.

usage: tools/make_tokenizer_goldens.py
"""
import json
import os
import pathlib
import random

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/data/text"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "mla"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
LETTERS = (
    r"\s?["
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}"
    r"\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}"
    r"\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}"
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}"
    r"\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}"
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}"
    r"\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}"
    r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}"
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}"
    r"\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}"
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
    "]+"
)
PUNCTUATION = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
CJK = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
CJK3 = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
WORDS3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


def digits(each=True):
    return pre_tokenizers.Digits(individual_digits=each)


def byte_level(use_regex=False, prefix=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


# By the name in tokenizer.ggml.pre.
PRE = {
    "deepseek-llm": [split("[\r\n]"), split(LETTERS), split(PUNCTUATION), split(r"\s+$"), split(CJK), digits()],
    "deepseek-coder": [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(CJK), digits()],
    "deepseek-v3": [split(r"\p{N}{1,3}"), split(CJK3), split(WORDS3)],
    "llama-bpe": [split(LLAMA3)],
    "qwen2": [split(QWEN2)],
    "gpt-2": [split(GPT2)],
    "smollm": [digits(), split(GPT2)],
}


def pre_tokenizer(name):
    return pre_tokenizers.Sequence([*PRE[name], byte_level()])


def awkward_strings():
    s = [
        "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\n \n", "   \n\n  \t x", "a", " a", "a ", "  a  b   c    d",
        "Hello world", "Hello, world!", " Hello  world ", "The quick brown fox jumps over the lazy dog.", "HELLO hElLo",
        "I'm you're he's we've they'll I'd don't DON'T I'M WE'LL 'sT", "it'ſ 'K'ſ", "''''''", "don’t ‘quoted’ “double”", "isn't\n'tis",
        "0", "1", "12", "123", "1234", "12345", "1234567890", "3.14159", "1,000,000.00", "0x1F4A9", "1e-10", "٣٤٥٦", "१२३४५", "Ⅻ ⅷ ½ ¾ ² ³ ①②③",
        "x1y22z333", "v2.0.1-rc3", "2026-11-24T00:41:58Z", "50% of $1,234.56 €99 £5 ¥1000", "１２３４５", "四千五百 3つ 4개", "1 2  3   4",
        "def f(x):\n    return x * 2  # double\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n", "#include <stdio.h>\nint main(void) { return 0; }",
        "<html><body class=\"a b\">&nbsp;</body></html>", "SELECT * FROM t WHERE a='b' AND c>=10;", "a=b==c===d!=e<=f>=g->h=>i::j", "{{}}[[]](())<<>>",
        "https://example.com/a/b?c=d&e=f#g", "user@example.com", "C:\\Users\\x\\y.txt", "/usr/local/bin/../lib", "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
        "\\begin{equation} E = mc^2 \\end{equation}", "`code` **bold** _it_ ~~no~~", "- a\n- b\n  - c\n\n1. d\n2. e\n", "| a | b |\n|---|---|\n| 1 | 2 |", "```python\nprint('hi')\n```",
        "!", "!!", "!!!???...", "...", "…", "-- --- ----", "—–‒―", "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./", "a.b.c", "a,b", "(a)", "\"quoted\"", "¿Qué? ¡Sí!", "«guillemets»", "#hashtag @mention",
        "$x", "^a", "+b", "<c", "=d", "|e", "~f", "`g", "%h i", "/path", ".net", "_id", "-flag --flag",
        "café", "cafe\u0301", "naïve résumé", "Ångström A\u030angstro\u0308m \u212b", "ﬁ ﬂ ﬀ ﬃ", "ǆ Ǆ ǅ", "ß ẞ SS", "İi Iı", "\u1e9b\u0323", "q\u0307\u0323 q\u0323\u0307", "a\u0301\u0327\u0323", "\u0301", " \u0301a", "x\u0301\u0301\u0301\u0301\u0301\u0301",
        "한국어 텍스트", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "가\u11a8", "안녕하세요 세계 123", "ㄱㄴㄷ ㅏㅑ",
        "日本語のテキスト", "ひらがなカタカナ漢字", "こんにちは、世界！", "ｶﾀｶﾅ", "か\u3099 は\u309a", "東京2020オリンピック", "「引用」『二重』【墨】", "長音ー～〜",
        "中文文本", "你好，世界！", "我有3个苹果和12个梨。", "繁體中文測試", "中英mixed文本test", "《书名》、（括号）；：“引号”", "𠀀𠀁𠮷", "豈更車", "　全角　空格　", "ＡＢＣ　ａｂｃ", "龥龦龻鿿", "〇〆々",
        "Привет, мир!", "ЁЛКА ёлка Йй", "Ѐѐ ЀЀ", "українська мова ґ є і ї", "Γειά σου Κόσμε", "ΐ ΰ ᾧ ᾯ", "שלום עולם", "שָׁלוֹם", "مرحبا بالعالم", "اللُّغَةُ العَرَبِيَّة", "سلام\u200cدنیا", "नमस्ते दुनिया", "क्षत्रिय ज्ञान श्री", "বাংলা ভাষা", "ਪੰਜਾਬੀ ગુજરાતી ଓଡ଼ିଆ",
        "தமிழ் கொ", "తెలుగు ಕನ್ನಡ മലയാളം", "සිංහල", "ภาษาไทย น้ำ", "ພາສາລາວ", "မြန်မာဘာသာ", "ភាសាខ្មែរ", "བོད་སྐད།", "ქართული ᲥᲐᲠᲗᲣᲚᲘ", "Հայերեն և", "አማርኛ ፩፪፫", "ᏣᎳᎩ ᏸ", "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ᠌", "ᐃᓄᒃᑎᑐᑦ", "𐐀𐐨 𐓐 𞤀𞤢", "𓀀𓂀", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚", "ʻokina ʼn ŉ", "Tiếng Việt ố ồ ổ ỗ ộ", "o\u0302\u0301 o\u0323\u0302",
        "😀", "😀😃😄", "a😀b", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈 🏴‍☠️", "🇩🇪🇯🇵", "1️⃣ #️⃣", "❤️ ❤", "🤷🏻‍♀️ shrug", "☺☹™©®", "→←↑↓⇒∀∃∑∏√∞≠≤", "♠♣♥♦", "½⅓", "⠃⠗⠇", "🀄🂡", "🧑🏿‍🚀 in 🚀!", "\u2764\ufe0f\u200d\U0001f525",
        "\0", "a\0b", "\0\0\0", "\x01\x02\x1b[31mred\x1b[0m", "\x7f", "\x85", "a\x85b", "\u00a0", "a\u00a0b", " \u00a0 ", "\u1680x", "\u180e", "a\u180eb \u180e c", "\u2000\u2003\u2009 x", "\u2028\u2029", "a\u2028b", "\u202fx\u205fy", "\u200b\u200c\u200d\u2060", "\ufeffBOM", "x\u00ady", "\u200ertl\u200f", "\ufffd", "\ufffe\uffff", "\U0010ffff", "\ue000 private \U000f0000",
        "\v\f", "a\vb\fc", "\r", "\r\r\n\n", "a\rb", " \r\n x", "\n\n\n\n\n", "\t\t\tx", " \t \t", "x\n", "x \n", "x  \n\n  y", "\n x", "a\n\n\n  b\n   \nc", "trailing   ", "   leading", "end\n\n ", "tab\tsep\tval", "a  \u3000  b",
        "<s>", "</s>", "<s>Hello</s>", " <s> Hello </s> ", "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_start", "<|im_end|><|im_end|>", "<unk>", "<pad>", "<0x41>", "<0x0A>", "▁", "▁▁ ▁a▁", "a▁b",
        "<｜begin▁of▁sentence｜>Hi<｜end▁of▁sentence｜>", "<｜User｜>Who?<｜Assistant｜>Me", "<｜begin", "<think>\nhm\n</think>", "x<｜end▁of▁sentence｜> y", "｜ ▁ <｜｜>",
        "Ġ", "ĠHello Ċ Ã©", "ĉ", "ÿþ ÷ Àö", "Â\u00a0", "İ", "supercalifragilisticexpialidocious", "pneumonoultramicroscopicsilicovolcanoconiosis", "antidisestablishmentarianism's",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "a" * 1000, "ab" * 500, "abc" * 333, " " * 500, "\n" * 300, " a" * 300, "=" * 300, "-" * 128 + "\n", "0" * 257, "9876543210" * 40, "😀" * 100, "中" * 300, "\u0301" * 50, "é" * 200, "日本" * 150, "Á" * 100,
        "the of and to in a is that for it as was with be by on not he his but at are this have from or had", "The Cat sat. The cat sat! the CAT SAT?", "Mr. O'Neil's co-op, e.g. the U.S.A.", "3rd 2nd 1st 4th 21st", "10th-century", "A/B test", "C++ C# F#", "rock 'n' roll", "y'all'd've", "'s", " 's", "s's's", "ex'S", "\u2019s it\u2019s",
        "JSON: {\"key\": [1, 2.5, null, true], \"k2\": \"v\\n\"}", "if(x){y;}else{z;}", "a\\nb\\tc", "\\u00e9 \\x41", "%20%7E", "0b1010 0o17", "x := <-ch", "fn main() -> Result<(), Box<dyn Error>> {}", "λx.x ∘ μ", "f′(x) ≈ Δy/Δx", "H₂O CO₂ x²+y²", "naïve.façade()", "ΑΒΓ αβγ ς",
        "mixed العربية and English 123 עברית", "русский+english混合한국어", "pi=3.14;π≈3.14", "Zürich—Genève", "smörgåsbord ÆØÅ æøå", "Łódź źdźbło", "çğıöşü ÇĞİÖŞÜ", "őű ŐŰ", "ñandú", "Ðð Þþ", "ĳ Ĳ", "\u0149", "Ω Å K", "ª º µ", "ⓐⓑⓒ ㈱ ㍿ ㎏", "٪ ، ؛ ؟", "।॥", "။ ၊", "።፣", "\u061c\u2066x\u2069",
    ]
    rng = random.Random(3)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x250, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xFFF), (0x1100, 0x11FF), (0x1E00, 0x20CF), (0x2100, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFE00, 0xFFEF), (0x1F300, 0x1F64F)]  # fmt: skip
    for _ in range(60):  # characters of two or three ranges, with spaces, digits and newlines between
        picks = [rng.choice(ranges) for _ in range(rng.randint(2, 3))] + [(0x20, 0x20), (0x30, 0x39), (0x0A, 0x0A)]
        s.append("".join(chr(rng.randint(*rng.choice(picks))) for _ in range(rng.randint(5, 60))))
    for _ in range(30):
        s.append("".join(rng.choice([" ", "  ", "\n", "\t", "\r\n", "a", "Bc", "'s", "'LL", "1", "23", "4567", ".", "!?", "é", "中", "\u0301", "\u3000", "😀", "\u00a0", "_", "\x85"]) for _ in range(40)))  # fmt: skip
    return list(dict.fromkeys(s))


ADDED = [
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("</s>", special=True, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("Hello", special=False, normalized=True),
    AddedToken("sat", special=False, single_word=True, normalized=False),
    AddedToken("<unk>", special=True, normalized=False),
    AddedToken("<pad>", special=True, normalized=False, lstrip=True, rstrip=True),
    AddedToken("test", special=False, lstrip=True, normalized=False),
    AddedToken("    ", special=False, normalized=False),
    AddedToken("caf\u00e9", special=False, normalized=True),
]


def tiny_bytes(strings):
    """Merges that cross every boundary, so that ids show where text was cut."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = byte_level()
    t.train_from_iterator(strings * 2, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=12, show_progress=False))
    t.decoder = decoders.ByteLevel()
    t.add_tokens(ADDED)
    return t


def tiny_sentencepiece(strings):
    """Llama 2's way: <unk>, <s>, </s>, 256 byte tokens, then pieces with U+2581 for spaces."""
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    kept = [x for x in strings if x and all(ord(c) < 0x250 and c >= " " for c in x)]
    t.train_from_iterator(kept * 2, trainers.BpeTrainer(vocab_size=700, max_token_length=10, show_progress=False))
    model = json.loads(t.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces = list(dict.fromkeys([*first, *sorted(model["vocab"], key=model["vocab"].get)]))
    merges = [tuple(m) for m in model["merges"]]
    t = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.add_special_tokens([AddedToken(x, normalized=False) for x in ("<unk>", "<s>", "</s>")])
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("café", normalized=True)])
    return t


def smollm2():
    fields = gguf.GGUFReader(CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    t = Tokenizer(models.BPE({x: i for i, x in enumerate(tokens)}, merges))
    t.pre_tokenizer = pre_tokenizers.Sequence([digits(), byte_level(use_regex=True)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(x, normalized=False) for x, kind in zip(tokens, types) if kind == 3])
    return t


def changed(tokenizer, **parts):
    """A copy with some parts replaced, and the replacement as JSON for the test to make as well."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    for name, part in parts.items():
        setattr(copy, name, part)
    whole = json.loads(copy.to_str())
    return copy, {name: whole[name] for name in parts}


def main():
    strings = awkward_strings()
    ordinary = [x for x in strings if not any(c in x for c in ("<|", "<s>", "</s>", "<unk>", "<pad>", "<think>"))]
    deepseek, qwen2 = (Tokenizer.from_file(str(CACHE / f"tokenizers/{n}.json")) for n in ("deepseek", "qwen2"))
    tiny, llama2 = tiny_bytes(ordinary), tiny_sentencepiece(ordinary)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, tokenizer in (("tiny_bytes", tiny), ("tiny_sentencepiece", llama2)):
        tokenizer.save(str(OUT / f"{name}.json"), pretty=False)
    cases = []

    def case(base, tokenizer, patch=None, pre=None, parse_special=True, add_special=False, decode=False):
        tokenizer.encode_special_tokens = not parse_special
        encodings = tokenizer.encode_batch(strings, add_special_tokens=add_special)
        entry = {"base": base, "patch": patch or {}, "pre": pre or "", "parse_special": parse_special, "add_special": add_special}
        entry["ids"] = [e.ids for e in encodings]
        if decode:
            entry["decoded"] = [tokenizer.decode(e.ids, skip_special_tokens=True) for e in encodings]
        tokenizer.encode_special_tokens = False
        cases.append(entry)

    case("deepseek", deepseek)
    case("deepseek", deepseek, parse_special=False)
    case("qwen2", qwen2)
    case("qwen2", qwen2, parse_special=False)
    case("smollm2", smollm2())
    # One vocabulary under the pre-tokenizer of every family, as a GGUF names it and as tokenizer.json spells it.
    for name in PRE:
        copy, patch = changed(tiny, pre_tokenizer=pre_tokenizer(name), normalizer=normalizers.NFC() if name == "qwen2" else tiny.normalizer)
        if name == "llama-bpe":
            copy.model.ignore_merges = True
        case("tiny_bytes", copy, patch, name)
    for part in (
        {"pre_tokenizer": byte_level(use_regex=True, prefix=True)},
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.Sequence([normalizers.Replace(Regex(r"[ \t]+"), " "), normalizers.Prepend("x")])},
        {"post_processor": processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", tiny.token_to_id("<s>")), ("</s>", tiny.token_to_id("</s>"))])])},
        *({"pre_tokenizer": pre_tokenizers.Sequence([split(r"\s+|\d", b), byte_level()])} for b in ("removed", "merged_with_previous", "merged_with_next", "contiguous")),
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True), digits(False), byte_level()])},
        {"pre_tokenizer": pre_tokenizers.Sequence([split(r"x*"), pre_tokenizers.Split("ab", "isolated"), byte_level()])},
    ):
        copy, patch = changed(tiny, **part)
        case("tiny_bytes", copy, patch, add_special=True)
    case("tiny_bytes", tiny, parse_special=False)
    case("tiny_sentencepiece", llama2, add_special=True, decode=True)
    case("tiny_sentencepiece", llama2, parse_special=False)
    for scheme in ("always", "first", "never"):
        for cut in (True, False):
            copy, patch = changed(llama2, normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=cut), decoder=decoders.Metaspace(prepend_scheme=scheme))
            case("tiny_sentencepiece", copy, patch)
    with open(OUT / "goldens.json", "w", encoding="utf-8") as file:
        json.dump({"strings": strings, "cases": cases}, file, ensure_ascii=True, separators=(",", ":"))
    print(f"{len(strings)} strings, {len(cases)} cases, {sum(len(c['ids']) for c in cases)} encodings, {(OUT / 'goldens.json').stat().st_size / 1e6:.1f} MB")


main()
