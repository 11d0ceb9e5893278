"""Paddle, for modules outside this package.

`import paddle` there is sorted before the imports of this package and so would run before the
plug-in is registered (see the package's `__init__`); from here it comes after.
"""

import paddle

__all__ = ["paddle"]
