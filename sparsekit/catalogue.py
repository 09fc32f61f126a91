"""The built-in entries: what a name stands for, in one line, and where it comes from.

A static table, so that listing imports nothing; a test holds every summary and source equal to the class's docstring.
"""

from __future__ import annotations

Line = tuple[str, str, str]  # "module:class", summary, source

BUILT_IN: dict[str, dict[str, Line]] = {
    "attention": {
        "mha": (
            "sparsekit.components.attention:MultiHead",
            "Multi-head attention: as many key-value heads as query heads.",
            "Vaswani et al. 2017, arXiv 1706.03762, sec. 3.2.2",
        ),
        "gqa": (
            "sparsekit.components.attention:GroupedQuery",
            "Grouped-query attention: each of n_kv_heads key-value heads serves n_heads / n_kv_heads query heads.",
            "Ainslie et al. 2023, arXiv 2305.13245",
        ),
        "mqa": (
            "sparsekit.components.attention:MultiQuery",
            "Multi-query attention: one key-value head for all query heads.",
            "Shazeer 2019, arXiv 1911.02150",
        ),
    },
    "kernel": {
        "sdpa": (
            "sparsekit.components.kernels:SDPA",
            "torch's scaled_dot_product_attention, which picks the fastest backend of the device.",
            "PyTorch",
        ),
        "eager": (
            "sparsekit.components.kernels:Eager",
            "The formula written out, scores and probabilities whole: the reference that every kernel is held against.",
            "Vaswani et al. 2017, arXiv 1706.03762, eq. 1",
        ),
    },
    "position": {
        "rope": (
            "sparsekit.components.positions:RoPE",
            "Rotates query and key by their position: pair (i, i + K/2) turns by position * theta^(-2i/K).",
            "Su et al. 2021, arXiv 2104.09864, eq. 34",
        ),
        "none": (
            "sparsekit.components.positions:NoPosition",
            "Leaves query and key as they are; causality alone tells order.",
            "Kazemnejad et al. 2023, arXiv 2305.19466",
        ),
    },
    "ffn": {
        "mlp": (
            "sparsekit.components.feedforward:MLP",
            "FFN(x) = W_down act(W_up x).",
            "Vaswani et al. 2017, arXiv 1706.03762, eq. 2",
        ),
        "gated": (
            "sparsekit.components.feedforward:Gated",
            "FFN(x) = W_down (act(W_gate x) * W_up x), with any activation.",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "swiglu": (
            "sparsekit.components.feedforward:SwiGLU",
            "FFN(x) = W_down (silu(W_gate x) * W_up x).",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "geglu": (
            "sparsekit.components.feedforward:GEGLU",
            "FFN(x) = W_down (gelu(W_gate x) * W_up x).",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "reglu": (
            "sparsekit.components.feedforward:ReGLU",
            "FFN(x) = W_down (relu(W_gate x) * W_up x).",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "moe": (
            "sparsekit.components.moe:MoE",
            "y_t = sum over the assignments (t, e, w) of w FFN_e(x_t), plus a shared expert that every token visits.",
            "Shazeer et al. 2017, arXiv 1701.06538, eq. 1; shared experts: Dai et al. 2024, arXiv 2401.06066, eq. 9",
        ),
    },
    "activation": {
        "relu": (
            "sparsekit.components.activations:ReLU",
            "max(0, x).",
            "Nair & Hinton 2010, ICML",
        ),
        "gelu": (
            "sparsekit.components.activations:GELU",
            "x Phi(x), Phi the standard normal distribution function.",
            "Hendrycks & Gimpel 2016, arXiv 1606.08415, eq. 1",
        ),
        "silu": (
            "sparsekit.components.activations:SiLU",
            "x sigmoid(x).",
            "Elfwing, Uchibe & Doya 2017, arXiv 1702.03118, eq. 3",
        ),
    },
    "router": {
        "top_k": (
            "sparsekit.components.routers:TopK",
            "The k experts of highest score, s = softmax(W x) or sigmoid(W x), weighted by s (renormalised on request).",
            "Shazeer et al. 2017, arXiv 1701.06538; losses: arXiv 2101.03961, eq. 4, and 2202.08906, eq. 5",
        ),
    },
    "norm": {
        "rmsnorm": (
            "sparsekit.components.norms:RMSNorm",
            "y = x / sqrt(mean(x^2) + eps) * weight.",
            "Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4",
        ),
        "layernorm": (
            "sparsekit.components.norms:LayerNorm",
            "y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, the variance biased.",
            "Ba, Kiros & Hinton 2016, arXiv 1607.06450, eq. 4",
        ),
        "none": (
            "sparsekit.components.norms:NoNorm",
            "y = x, for ablations.",
            "",
        ),
    },
    "residual": {
        "pre_norm": (
            "sparsekit.components.residuals:PreNorm",
            "h = x + scale attention(norm(x)); y = h + scale ffn(norm(h)).",
            "Xiong et al. 2020, arXiv 2002.04745, table 1; scale: Hu et al. 2024, arXiv 2404.06395",
        ),
        "post_norm": (
            "sparsekit.components.residuals:PostNorm",
            "h = norm(x + scale attention(x)); y = norm(h + scale ffn(h)).",
            "Vaswani et al. 2017, arXiv 1706.03762, sec. 3.1",
        ),
    },
    "linear": {
        "plain": (
            "sparsekit.components.linears:PlainLinear",
            "y = x W^T + b, a dense projection.",
            "",
        ),
    },
    "embedding": {
        "token": (
            "sparsekit.components.embeddings:TokenEmbedding",
            "x = scale * table[id].",
            "Vaswani et al. 2017, arXiv 1706.03762, sec. 3.4",
        ),
    },
    "init": {
        "normal": (
            "sparsekit.components.inits:Normal",
            "Every weight from N(0, std^2).",
            "Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
        ),
        "depth_scaled": (
            "sparsekit.components.inits:DepthScaled",
            "N(0, std^2), but N(0, std^2 / 2L) for what writes to the residual stream (o and down), L the layers.",
            "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, sec. 2.3",
        ),
    },
    "objective": {
        "next_token": (
            "sparsekit.training.objectives:NextToken",
            "Cross-entropy of the next token, -sum log p(target), in nats.",
            "Bengio et al. 2003, JMLR 3",
        ),
    },
    "optimizer": {
        "adamw": (
            "sparsekit.training.optimizers:AdamW",
            "Adam with decoupled weight decay, of matrices only by default (norms, biases and embeddings are not decayed).",
            "Loshchilov & Hutter 2017, arXiv 1711.05101, alg. 2",
        ),
    },
    "schedule": {
        "constant": (
            "sparsekit.training.schedules:Constant",
            "1 after the warm-up.",
            "",
        ),
        "cosine": (
            "sparsekit.training.schedules:Cosine",
            "final + (1 - final)(1 + cos(pi t))/2, with t from 0 to 1 after the warm-up.",
            "Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5",
        ),
        "wsd": (
            "sparsekit.training.schedules:WarmupStableDecay",
            "1, then linearly to final over the last decay_share of the steps.",
            "Hu et al. 2024, arXiv 2404.06395, sec. 4",
        ),
    },
    "callback": {
        "progress": (
            "sparsekit.training.callbacks:Progress",
            "A progress line with loss, tokens a second and time left; plain lines where there is no terminal.",
            "",
        ),
        "tensorboard": (
            "sparsekit.training.callbacks:TensorBoard",
            "Every number of metrics.jsonl as a TensorBoard scalar, in the run's folder tb/.",
            "",
        ),
        "sample": (
            "sparsekit.training.callbacks:Sample",
            "Prints text that the trained model writes, at the end.",
            "",
        ),
    },
    "source": {
        "embedded": (
            "sparsekit.data.sources:Embedded",
            "Jane Austen's six novels, which come with the package: Persuasion is held out as validation, the rest train.",
            "",
        ),
        "text": (
            "sparsekit.data.sources:TextFiles",
            "Plain UTF-8 text files, each one document, or several where a separator line divides them.",
            "",
        ),
        "jsonl": (
            "sparsekit.data.sources:JSONLines",
            "JSON Lines files: one object a line, whose text is in one field.",
            "",
        ),
    },
    "tokenizer": {
        "byte": (
            "sparsekit.data.tokenizers:ByteTokenizer",
            "Each byte of the UTF-8 text is a token, 0 to 255, and 256 ends a text.",
            "Xue et al. 2021, arXiv 2105.13626",
        ),
        "bpe": (
            "sparsekit.data.tokenizers:BPETokenizer",
            "Byte-level byte-pair encoding: bytes, of which the most frequent adjacent pair is merged again and again.",
            "Sennrich, Haddow & Birch 2016, arXiv 1508.07909, alg. 1; on bytes: Radford et al. 2019 (GPT-2), sec. 2.2",
        ),
    },
}
