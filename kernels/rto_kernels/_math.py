"""Constants and functions that several kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
# 2 to it is 0, and 0 · FLOOR is 0 where 0 · −inf would be NaN.
FLOOR = tl.constexpr(-1.0e5)


@triton.jit
def tanh(x):
    # Near 0 a polynomial (a fit of (tanh x − x)/x³ in x², below 1 ulp), else (1 − t)/(1 + t) with t =
    # exp(−2|x|).
    square = x * x
    fit = -0.00627639 * square + 0.02111622
    fit = fit * square - 0.05387514
    fit = fit * square + 0.13332924
    fit = fit * square - 0.3333333
    near = x + x * square * fit
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def log2(x):
    """log₂ x, fp32, good to the last digits beside 1 too, where the GPU's own is off by up to 2^−22: there by the
    series of log((1 + s)/(1 − s)), s = (x − 1)/(x + 1)."""
    s = (x - 1.0) / (x + 1.0)
    square = s * s
    near = square * (1.0 / 9.0) + 1.0 / 7.0
    near = square * near + 1.0 / 5.0
    near = square * near + 1.0 / 3.0
    near = (2.0 * LOG2E) * (s + s * square * near)
    return tl.where((x > 0.75) & (x < 1.5), near, tl.log2(x))


@triton.jit
def expm1(x):
    """exp(x) − 1 for x ≤ 0, fp32: near 0 by its series, where the subtraction would leave no digits."""
    near = 1.0 + x * (1.0 / 7.0)
    near = 1.0 + x * near * (1.0 / 6.0)
    near = 1.0 + x * near * (1.0 / 5.0)
    near = 1.0 + x * near * (1.0 / 4.0)
    near = 1.0 + x * near * (1.0 / 3.0)
    near = 1.0 + x * near * (1.0 / 2.0)
    return tl.where(x > -0.35, x * near, tl.exp2(x * LOG2E) - 1.0)
