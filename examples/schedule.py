"""The paper's schedule of window and global layers (section 5), and what it costs."""

import iha

LAYERS, LENGTH, HEADS, HEAD_DIM = 26, 8192, 20, 128  # the paper's 2.4B model

print("P    window  attention FLOPs / plain")
for pseudo_heads in (2, 4, 8, 20):
    schedule = iha.hybrid_schedule(LAYERS, LENGTH, pseudo_heads)
    ratio = schedule.flops(HEADS, HEAD_DIM) / schedule.plain_flops(HEADS, HEAD_DIM)
    print(f"{pseudo_heads:<4} {schedule.window:>6}  {ratio:.2f}")

everywhere = iha.attention_flops(LENGTH, HEADS, HEAD_DIM, pseudo_heads=4)
plain = iha.attention_flops(LENGTH, HEADS, HEAD_DIM)
print(f"a global IHA layer at P = 4 costs {everywhere / plain:.1f} times a plain one")
