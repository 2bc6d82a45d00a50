"""Bytes that a forward pass keeps for its backward pass, counted tensor by tensor from what the modules save.

The rules are autograd's: a product keeps its factors, a linear layer its input, SiLU its input, attention q, k, v, its
output and the logarithm of its sum; sums, views, casts and products with a number keep nothing.  A tensor that two
operations keep is counted once.  `tests/planning` compares the sums with the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mirai_ds.config import ForesightConfig, ModelConfig, RecomputeConfig
from mirai_ds.config.foresight_config import HEAD_ATTENTION_HEADS
from mirai_ds.config.sizes import block_parameters, heads_parameters, parameter_count
from mirai_ds.kernels.linear_cross_entropy.op import CHUNK_BYTES
from mirai_ds.planning.flops import student_slots

FP32 = 4


@dataclass(frozen=True)
class ActivationMemory:
    """One rank's forward pass: `micro` sequences, and who aligns them.  feature_dim: the teacher's width."""

    model: ModelConfig
    foresight: ForesightConfig
    feature_dim: int
    precision: str
    micro: int
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    compiled_loss: bool = True  # mirai::foresight_cosine's kernel, not its reference in plain PyTorch
    chunked: bool = True  # the next-token loss, a few rows of logits at a time
    device: str = "cuda"  # whose chunks
    compiled: bool = False  # blocks, by torch.compile

    @property
    def rows(self) -> int:
        """The number of slots of all sequences together."""
        return self.micro * student_slots(self.model)

    @property
    def predicting(self) -> int:
        """Slots that predict the next token: PAR's learnable ones among them, but not the last ones."""
        return self.micro * self.model.block_size

    @property
    def mtp(self) -> bool:
        """Whether the heads end in logits of their own (multi-token prediction)."""
        return self.foresight.predicts_tokens

    @property
    def heads_again(self) -> bool:
        """Whether the backward pass runs mtp's heads again, as the engine decides."""
        return self.mtp and self.recompute.policy != "none"

    @property
    def low(self) -> bool:
        """Whether matrix products run in bf16."""
        return self.precision != "fp32"

    @property
    def compute(self) -> int:
        """Bytes of a number that a matrix product reads and writes."""
        return 2 if self.low else FP32

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream: autocast leaves it in fp32."""
        return 2 if self.precision == "bf16" else FP32

    @property
    def parameter(self) -> int:
        """Bytes of a parameter and of its gradient as autograd makes it."""
        return 2 if self.precision == "bf16" else FP32

    @property
    def autocast(self) -> bool:
        """Whether weights are cast to bf16 anew in each forward pass, and the copies kept for the backward pass."""
        return self.precision == "bf16-autocast"

    # --- sizes in parameters ----------------------------------------------------------------------------------------

    @property
    def head_parameters(self) -> int:
        """The number of parameters of all alignment heads."""
        return heads_parameters(self.foresight, self.model.width, self.feature_dim)

    @property
    def parameters(self) -> int:
        """The number of parameters of GPT and heads."""
        return parameter_count(self.model) + self.head_parameters

    @property
    def block_linear(self) -> int:
        """The number of weights in one block's matrices."""
        return block_parameters(self.model) - 2 * self.model.width

    @property
    def output_parameters(self) -> int:
        """The number of parameters of the output matrix and the last norm."""
        return (self.model.vocab_size + 1) * self.model.width

    @property
    def embedding_parameters(self) -> int:
        """The number of parameters of the token and class tables and PAR's learnable tokens."""
        m = self.model
        return (m.vocab_size + m.num_classes + 1 + m.learnable_tokens) * m.width

    # --- kept for backward ------------------------------------------------------------------------------------------

    @property
    def logits(self) -> int:
        """Bytes of all logits (B, N, V) once in fp32."""
        return self.predicting * self.model.vocab_size * FP32

    @property
    def chunk(self) -> int:
        """Bytes of one chunk of logits in fp32."""
        rows = max(1, CHUNK_BYTES[self.device] // (FP32 * self.model.vocab_size))
        return min(self.predicting, rows) * self.model.vocab_size * FP32

    def chunked_gradients(self) -> float:
        """What the chunked loss keeps from the forward to the backward pass: gradients of the states and, summed in
        fp32, of the output matrix."""
        return float(self.predicting * self.model.width * self.compute + FP32 * self.output_parameters)

    def chunk_at_work(self) -> float:
        """Beside them while a chunk is at work: its logits and their log-softmax, the chunk's part of the matrix's
        gradient, and in autocast the matrix's copy."""
        matrix = 2.0 * self.output_parameters if self.autocast else 0.0
        return 2.0 * self.chunk + self.compute * self.output_parameters + matrix

    @property
    def head_logits(self) -> int:
        """Bytes of one mtp head's logits; it predicts at all slots."""
        return self.rows * self.model.vocab_size * FP32

    def norm(self, rows: int, number: int) -> int:
        """RMSNorm of `rows` vectors with `number` bytes an element: the input in fp32 (in bf16 a copy of its own),
        1/rms, the normed value, and the output, which the next linear layer reads: in autocast as a bf16 copy."""
        return rows * self.model.width * (FP32 + number + self.compute) + rows * FP32

    def mask(self, rate: float) -> int:
        """Bytes of a keyed dropout's mask, one an element."""
        return self.rows * self.model.width if rate > 0 else 0

    def block(self) -> int:
        """All that one block keeps, its fp32 input included (in bf16 nothing keeps the input, but the norm's copy)."""
        return self.attention() + self.feed_forward()

    def attention(self) -> int:
        """The first half's part of it.  Compiled, it is the same at every size, precision and dropout rate: the input,
        the norm's output, qkv, rotated q and k, attention's output and what `wo` makes of it; all else is computed
        again within fused kernels."""
        m, rows, c = self.model, self.rows, self.compute
        if self.compiled:
            return rows * m.width * (self.residual + (1 + 3 + 2 + 1 + 1) * c) + rows * (m.heads + 1) * FP32
        inside = rows * m.width * c * (3 + 2 + 1) + rows * m.heads * FP32  # qkv (v is a view); rotated q, k; output
        inside += m.slots**2 * c if m.par_tokens else 0  # PAR's mask, which each block turns into numbers to add
        return self.norm(rows, self.residual) + inside + self.mask(0.0 if m.drop_path else m.resid_dropout)

    def feed_forward(self) -> int:
        """The second half's; compiled, SiLU's output and this half's mask are made again, not the first half's."""
        m, rows, c = self.model, self.rows, self.compute
        if self.compiled:
            mask = self.mask(0.0 if m.drop_path else m.resid_dropout)
            return rows * (m.width + 3 * m.ffn_hidden) * c + rows * FP32 + mask
        inside = 4 * rows * m.ffn_hidden * c  # w1 x, silu of it, w3 x, their product
        shared_input = rows * m.width * c if self.autocast else 0  # w1 and w3 each cast the same fp32 input
        return self.norm(rows, self.residual) + inside + shared_input + self.mask(0.0 if m.drop_path else m.ffn_dropout)

    def block_weights(self) -> int:
        """Bytes of the bf16 copies of one block's matrices under autocast."""
        return 2 * self.block_linear if self.autocast else 0

    def feed_forward_weights(self) -> int:
        """Bytes of the bf16 copies of the feed-forward's matrices under autocast."""
        return 2 * 3 * self.model.width * self.model.ffn_hidden if self.autocast else 0

    def recomputed(self, index: int) -> bool:
        """Whether block `index` (0-based), or its second half, is run again in the backward pass."""
        policy, every = self.recompute.policy, self.recompute.every
        return policy in ("full", "mlp") or (policy == "every-n" and index % every == 0)

    def recomputed_blocks(self) -> float:
        """Blocks that are run again, by their share of a block's matrix products."""
        whole = sum(self.recomputed(i) for i in range(self.model.depth))
        half = 3 * self.model.width * self.model.ffn_hidden / self.block_linear
        return whole * (half if self.recompute.policy == "mlp" else 1.0)

    def again(self, index: int) -> int:
        """Bytes that block `index`'s backward pass makes again, weight copies included."""
        if not self.recomputed(index):
            return 0
        if self.recompute.policy == "mlp":
            return self.feed_forward() + self.feed_forward_weights()
        return self.block() + self.block_weights()

    def kept_by_block(self, index: int) -> int:
        """Bytes that stay from block `index`'s forward pass to its backward pass, weight copies included."""
        if not self.recomputed(index):
            return self.block() + self.block_weights()
        state = self.rows * self.model.width * self.residual
        if self.recompute.policy == "mlp":
            kept = self.attention() + self.block_weights() - self.feed_forward_weights()
            return kept if self.compiled else kept + state  # the half's input: compiled, made of what is kept
        return state

    def ends(self) -> int:
        """Token dropout's mask, the last norm, and the output matrix's bf16 copy in autocast; the chunked loss keeps
        neither that nor the norm's output, but gradients."""
        norm = self.norm(self.predicting, self.residual)
        if self.chunked:
            return self.mask(self.model.token_dropout) + norm - self.predicting * self.model.width * self.compute
        copies = 2 * self.model.vocab_size * self.model.width if self.autocast else 0
        return self.mask(self.model.token_dropout) + norm + copies

    def heads(self) -> int:
        """What the heads keep: inputs, what is between, and for the loss; in autocast copies of their weights."""
        f = self.foresight
        if not f.heads:
            return 0
        weights = 2 * self.head_parameters if self.autocast and not self.heads_again else 0
        return self.states_for_heads() + f.heads * (0 if self.heads_again else self.head()) + weights

    def states_for_heads(self) -> int:
        """The heads' input.  In autocast each MLP casts the hidden state (a transformer's norm keeps it as it is); in
        bf16 nobody else keeps it, but a recomputed block above."""
        f = self.foresight
        own = 1 - self.recomputed(f.layer or 0) if (f.layer or 0) < self.model.depth else 1
        casts = f.heads if f.head == "mlp" and not self.heads_again else 0
        return {"bf16-autocast": casts, "bf16": own, "fp32": 0}[self.precision] * self.rows * self.model.width * 2

    def head(self) -> int:
        """What one head keeps beside its input: an MLP four hidden tensors; then the loss."""
        f, rows, c = self.foresight, self.rows, self.compute
        if f.head == "mlp":
            return rows * (4 * f.projector_dim * c) + self.loss_of_a_head()
        # Two norms' outputs, qkv, attention's output, the MLP's two wide tensors, the last layer's input; and the
        # residual stream within the head.  Attention's sums and the norms' means and deviations are fp32.
        inside = self.model.width * ((1 + 1 + 3 + 1 + 4 + 4 + 1) * c + self.residual)
        return rows * (inside + (HEAD_ATTENTION_HEADS + 4) * FP32) + self.loss_of_a_head()

    def loss_of_a_head(self) -> int:
        """What one head's loss keeps.  The cosine: the kernel the gradient; the reference (in fp32) a gathered copy and
        its wide one, the normed and the gathered target.  mtp: norm, logarithms of probabilities, wanted tokens."""
        if self.mtp:
            return self.norm(self.rows, self.compute) + self.head_logits + 8 * self.rows
        return self.rows * self.feature_dim * (self.compute if self.compiled_loss else 3 * FP32)

    @property
    def widest_in_head(self) -> int:
        """Width of a head's hidden tensors."""
        return 4 * self.model.width if self.foresight.head == "transformer" else self.foresight.projector_dim

    def projected(self) -> int:
        """The heads' outputs, alive until the loss is computed; mtp goes on with each at once."""
        return 0 if self.mtp else self.foresight.heads * self.rows * self.feature_dim * self.compute

    def blocks(self, up_to: int | None = None) -> int:
        """What blocks 0 .. up_to - 1 (default all) keep."""
        return sum(self.kept_by_block(i) for i in range(self.model.depth if up_to is None else up_to))
