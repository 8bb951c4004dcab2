"""Chinese instructions of the course's own making: short facts put into templates, each with its one right answer.

A few hundred rows like those of a Chinese Alpaca set, in two manners of answering: they show prompts, masks and losses
on a small model, and whether an adapter changes the manner and keeps the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

MANNERS = {"plain": "{}", "sentence": "答案是{}。"}
WORDS = (  # a Chinese word, its English one
    "苹果 apple 书 book 水 water 猫 cat 狗 dog 鸟 bird 鱼 fish 马 horse 树 tree 花 flower 山 mountain 河 "
    "river 海 sea 太阳 sun 月亮 moon 星星 star 雨 rain 雪 snow 风 wind 火 fire 门 door 窗 window 桌子 "
    "table 椅子 chair 床 bed 灯 lamp 车 car 船 ship 路 road 桥 bridge 学校 school 老师 teacher 学生 "
    "student 朋友 friend 父亲 father 母亲 mother 手 hand 眼睛 eye 心 heart 米饭 rice 面包 bread 牛奶 milk "
    "茶 tea 糖 sugar 盐 salt 红 red 绿 green 蓝 blue 白 white 黑 black"
)
OPPOSITES = (  # two characters
    "大小 高低 长短 多少 快慢 新旧 冷热 轻重 远近 早晚 左右 上下 前后 里外 开关 来去 买卖 进退 黑白 真假 "
    "好坏 胖瘦 粗细 深浅 软硬 干湿 强弱 美丑 贫富 生死 哭笑 爱恨 胜败 升降 东西 南北 天地 男女 古今"
)
MEASURES = (  # a noun, its measure word last
    "书本 猫只 狗条 马匹 鱼条 树棵 花朵 山座 桥座 河条 车辆 船艘 纸张 桌子张 椅子把 刀把 灯盏 门扇 井口 "
    "牛头 羊只 衣服件 帽子顶 信封 画幅 歌首 诗首 电影部 药片 珠子颗"
)
DIGITS = "零一二三四五六七八九"
WEEK = "一二三四五六日"


def made_instructions(manner: str = "plain") -> list[dict[str, str]]:
    """Rows of instruction, input and output, each instruction with its input once, always the same ones in one order.

    `manner` is a key of `MANNERS`; the rows of both differ in nothing but what stands around the answer.
    Raises KeyError for another manner.
    """
    form = MANNERS[manner]
    rows = [row for rows in (_sums(), _sorting(), _words(), _days()) for row in rows]
    unique = {row[:2]: row for row in rows}
    return [
        {"instruction": instruction, "input": given, "output": form.format(answer)}
        for instruction, given, answer in unique.values()
    ]


def _sums() -> Iterator[tuple[str, str, str]]:
    """Adding and subtracting up to twenty; odd or even; the digit as a character."""
    for a in range(1, 11):
        for b in range(1, 11, 2):
            yield "计算下面的加法。", f"{a}+{b}", str(a + b)
    for a in range(4, 21, 2):
        for b in range(1, 4):
            yield "计算下面的减法。", f"{a}-{b}", str(a - b)
    for number in range(1, 31):
        yield "下面的数是奇数还是偶数？", str(number), "奇数" if number % 2 else "偶数"
    for digit, character in enumerate(DIGITS):
        yield "用汉字写出下面的数字。", str(digit), character


def _sorting() -> Iterator[tuple[str, str, str]]:
    """Three numbers in order; the largest of three; three words with commas between them."""
    draw = random.Random(0)
    for _ in range(40):
        numbers = draw.sample(range(1, 10), 3)
        yield "把下面的数字从小到大排列。", " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
        yield "找出下面最大的数字。", " ".join(map(str, numbers)), str(max(numbers))
    for _ in range(40):
        chosen = draw.sample(WORDS.split()[::2], 3)
        yield "用顿号连接下面的词。", " ".join(chosen), "、".join(chosen)


def _words() -> Iterator[tuple[str, str, str]]:
    """Into English and back; opposites both ways; measure words."""
    for chinese, english in zip(WORDS.split()[::2], WORDS.split()[1::2], strict=True):
        yield "把下面的词翻译成英语。", chinese, english
        yield "把下面的词翻译成中文。", english, chinese
    for first, second in OPPOSITES.split():
        yield f"写出“{first}”的反义词。", "", second
        yield f"写出“{second}”的反义词。", "", first
    for pair in MEASURES.split():
        yield "给下面的名词填上量词。", f"一（ ）{pair[:-1]}", pair[-1]


def _days() -> Iterator[tuple[str, str, str]]:
    """The day after and the day before, for each day of the week; the month after."""
    for index, day in enumerate(WEEK):
        yield f"星期{day}的后一天是星期几？", "", f"星期{WEEK[(index + 1) % 7]}"
        yield f"星期{day}的前一天是星期几？", "", f"星期{WEEK[index - 1]}"
    for month in range(1, 13):
        yield f"{month}月的下一个月是几月？", "", f"{month % 12 + 1}月"
