"""One trainer, one or more engines and the steps that move weights between them, as tests use them."""

from suite.driver.expecting import Expecting
from suite.driver.measuring import Measuring


class Sync(Measuring, Expecting):
    """A trainer connected to engines of one subject: moves weights, says what it expects, and measures."""
