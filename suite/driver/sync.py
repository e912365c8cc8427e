"""One trainer, one or more engines and the steps that move weights between them, as tests use them."""

from suite.driver.adapting import Adapting
from suite.driver.drafting import Drafting
from suite.driver.measuring import Measuring
from suite.driver.running import Running


class Sync(Measuring, Running, Adapting, Drafting):
    """A trainer connected to engines of one subject: moves weights, says what it expects, and measures."""
