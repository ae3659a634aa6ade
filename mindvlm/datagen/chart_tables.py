"""Makes random small tables with titles: the data of charts."""

from dataclasses import dataclass

import numpy as np

from mindvlm.datagen.dataset import pick


@dataclass(frozen=True)
class ChartTable:
    """The data and titles of a chart.

    Attributes:
        values: (series, categories) float64, multiples of `unit`.
        unit: smallest difference between two values.
    """

    title: str
    x_title: str
    y_title: str
    series: tuple[str, ...]
    categories: tuple[str, ...]
    values: np.ndarray
    unit: float

    def number(self, value: float) -> int | float:
        """Returns a value as the answer has it, without digits beyond `unit`."""
        digits = max(0, -int(np.floor(np.log10(self.unit) + 1e-9)))
        rounded = round(float(value), digits)
        return rounded if digits else int(rounded)

    def written(self, value: float) -> str:
        """Returns a value as the chart shows it."""
        return str(self.number(value))

    def as_dict(self) -> dict:
        """Returns the titles that are not empty, and the values by series and category (one series: by category)."""
        rows = [
            {name: self.number(value) for name, value in zip(self.categories, row, strict=True)} for row in self.values
        ]
        values = dict(zip(self.series, rows, strict=True)) if len(self.series) > 1 else rows[0]
        titles = {"title": self.title, "x_title": self.x_title, "y_title": self.y_title}
        return {key: text for key, text in titles.items() if text} | {"values": values}


_WORDS = {
    "en": {
        "topics": ("Sales", "Revenue", "Visitors", "Output", "Rainfall", "Exports", "Orders", "Energy use", "Members")
        + ("Passengers", "Downloads", "Harvest", "Budget", "Water level", "Accidents", "Births", "Prices", "Staff"),
        "title": ("{topic} by {axis}", "{topic} per {axis}", "{topic}: {place}", "{place}, {topic}", "{topic}"),
        "places": ("North Region", "Harbour City", "Plant 7", "Lakeside", "Upper Valley", "Branch Office", "Islands"),
        "units": ("million", "thousand", "tons", "pieces", "index", "USD", "hours", "percent", "km"),
        "axes": {
            "Year": [str(year) for year in range(1990, 2031)],
            "Month": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(),
            "Quarter": "Q1 Q2 Q3 Q4".split(),
            "Country": "Brazil Canada China Egypt France India Italy Japan Kenya Mexico Norway Peru Spain".split(),
            "Product": "Apples Bread Cheese Coffee Eggs Fish Honey Milk Oil Rice Salt Sugar Tea".split(),
            "Department": "Design Finance Legal Logistics Research Sales Support Training".split(),
            "Day": "Mon Tue Wed Thu Fri Sat Sun".split(),
        },
        "series": ("Group A|Group B|Group C", "2021|2022|2023", "Men|Women", "Online|Shops", "Plan|Actual")
        + ("North|South|West", "Small|Medium|Large", "New|Used"),
    },
    "zh": {
        "topics": tuple(
            "销售额 收入 游客数量 产量 降雨量 出口额 订单数 用电量 会员人数 客流量 下载量 粮食产量 预算".split()
        ),
        "title": ("各{axis}{topic}", "{place}{topic}", "{place}各{axis}{topic}统计", "{topic}", "{topic}（按{axis}）"),
        "places": tuple("北方地区 海港市 第七工厂 湖滨区 上游流域 分公司 东部群岛".split()),
        "units": tuple("万元 千人 吨 件 指数 亿元 小时 百分比 公里".split()),
        "axes": {
            "年份": [f"{year}年" for year in range(1990, 2031)],
            "月份": [f"{month}月" for month in range(1, 13)],
            "季度": "一季度 二季度 三季度 四季度".split(),
            "城市": "北京 上海 广州 深圳 杭州 成都 武汉 西安 南京 青岛 长沙 昆明".split(),
            "产品": "苹果 面包 奶酪 咖啡 鸡蛋 蜂蜜 牛奶 大米 食盐 白糖 茶叶".split(),
            "部门": "设计部 财务部 法务部 物流部 研发部 销售部 客服部 培训部".split(),
            "星期": "周一 周二 周三 周四 周五 周六 周日".split(),
        },
        "series": (
            "甲组|乙组|丙组",
            "2021年|2022年|2023年",
            "男|女",
            "线上|线下",
            "计划|实际",
            "北部|南部|西部",
            "大|中|小",
        ),
    },
}
_IN_ORDER = ("Year", "Month", "Quarter", "Day", "年份", "月份", "季度", "星期")


def random_table(
    rng: np.random.Generator, *, language: str, max_categories: int = 10, max_series: int = 3, in_order: bool = False
) -> ChartTable:
    """Makes a table in "en" or "zh"; with `in_order`, its categories are times."""
    words = _WORDS[language]
    axis = pick(rng, [name for name in words["axes"] if name in _IN_ORDER or not in_order])
    names = words["axes"][axis]
    count = int(rng.integers(3, min(max_categories, len(names)) + 1))
    if axis in _IN_ORDER:
        first = int(rng.integers(len(names) - count + 1))
        categories = tuple(names[first : first + count])
    else:
        categories = tuple(names[i] for i in rng.permutation(len(names))[:count])
    topic, place, unit_name = (pick(rng, words[key]) for key in ("topics", "places", "units"))
    series = (topic,)
    if max_series > 1 and rng.random() < 0.45:
        series = tuple(pick(rng, words["series"]).split("|"))[:max_series]
    unit = float(10.0 ** int(rng.integers(-2, 3)))
    values = _values(rng, len(series), count) * unit
    return ChartTable(
        title=pick(rng, words["title"]).format(topic=topic, axis=axis, place=place),
        x_title=axis if rng.random() < 0.6 else "",
        y_title=unit_name if rng.random() < 0.6 else "",
        series=series,
        categories=categories,
        values=values,
        unit=unit,
    )


def _values(rng: np.random.Generator, num_series: int, count: int) -> np.ndarray:
    """Returns whole numbers (num_series, count) of two or three digits, some with a trend."""
    largest = int(rng.integers(30, 1000))
    values = rng.uniform(0.1, 1.0, (num_series, count))
    if rng.random() < 0.5:
        values = 0.35 * values + 0.65 * np.linspace(*rng.uniform(0.15, 1.0, 2), count)
    return np.maximum(1, np.rint(values * largest))
