"""FLAGEN_LOGS: what flagen tells on stderr, by loggers of Python's logging: flagen.cache, flagen.render, flagen.code.

Without FLAGEN_LOGS nothing is attached and no level is set, so an application's own logging decides.
"""

from __future__ import annotations

import logging

from . import config

_FORMAT = "[%(name)s] %(message)s"
_handlers: dict[str, logging.Handler] = {}


def setup() -> None:
    """Gives each topic that FLAGEN_LOGS asks for its level and a handler to stderr, and takes back those it no longer
    asks for. Called where work begins, so that the variable is read at use. Raises ConfigError.
    """
    levels = config.log_levels()
    for topic in config.LOG_TOPICS:
        logger = logging.getLogger(f"flagen.{topic}")
        if topic in levels:
            logger.setLevel(levels[topic])
            if topic not in _handlers:
                _handlers[topic] = logging.StreamHandler()
                _handlers[topic].setFormatter(logging.Formatter(_FORMAT))
                logger.addHandler(_handlers[topic])
        elif topic in _handlers:
            logger.setLevel(logging.NOTSET)
            logger.removeHandler(_handlers.pop(topic))
