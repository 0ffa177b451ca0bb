"""MegaContext as a model of lm-evaluation-harness, under the name ``megacontext``.

Needs the extra ``lm-eval``; the harness is https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, Self

import torch
from lm_eval.api.model import TemplateLM as UntypedLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
)
from lm_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from megacontext.errors import InputError, ModelError
from megacontext.evaluation.lm_eval_config import LmEvalConfig
from megacontext.evaluation.long_requests import LongRequests
from megacontext.runtime.session import Session
from megacontext.runtime.tokenization import id_list
from megacontext.tasks.documents import final_answer

# The harness is typed only in part, and is not there for most users.
TemplateLM: Any = UntypedLM

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


class MegaContextLM(TemplateLM):
    """Answers the harness's three kinds of request at a fixed budget, one by one and in order.

    What fits into the budget is read as the plain model reads it; of anything longer, a temporary
    memory holds all and the focus chooses, see :class:`LongRequests`.

    Args:
        arguments: see :class:`LmEvalConfig`.

    Raises:
        ConfigError: an argument is unknown or not allowed, or the budget is too large for the base.
        ModelError: the base model or a checkpoint cannot be loaded.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.config = LmEvalConfig.from_model_args(arguments)
        self.session = Session(self.config)
        self.base = self.session.base
        self.tokenizer = self.base.tokenizer
        self.requests = LongRequests(self.session, stride=self.config.stride)
        self._device = self.base.device
        self._answered = 0

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The model of ``key=value,key=value``; see :meth:`create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The model of some arguments.

        Args:
            arg_dict: ``--model_args``.
            additional_config: the harness's own device and batch size; ``arg_dict`` goes before.
        """
        return cls(**{**(additional_config or {}), **arg_dict})

    @property
    def max_length(self) -> int:
        """Most tokens the model reads at once; texts may be longer."""
        return self.config.engine.budget

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of an answer, where the task does not say."""
        return self.config.max_gen_toks

    @property
    def batch_size(self) -> int:
        """Requests are run one by one."""
        return 1

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; ``None`` where the tokenizer has none."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text which is scored from its beginning.

        Raises:
            ModelError: there is none.
        """
        for token in (
            self.config.prefix_token_id,
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
        ):
            if token is not None:
                return int(token)
        raise ModelError(
            f"{self.base.name}: its tokenizer has no token to begin a text with; set "
            "prefix_token_id in model_args"
        )

    @property
    def tokenizer_name(self) -> str:
        """Name and fingerprint of the tokenizer, for the harness's request cache."""
        return f"{self.base.name}-{self.base.tokenizer_hash}".replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model reads.

        Args:
            chat_history: messages, each with ``role`` and ``content``.
            add_generation_prompt: end where the model's turn begins; otherwise the last message is
                one of the model's that it shall continue.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{self.base.name}: its tokenizer has no chat template; leave out "
                "--apply_chat_template"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text.

        Args:
            string: the text; special tokens written out in it count as such.
            add_special_tokens: whether the first token is put before it; as configured if ``None``.
        """
        ids = id_list(self.base.encode(string))
        first: int | None = self.tokenizer.bos_token_id
        wanted = self.config.add_bos_token if add_special_tokens is None else add_special_tokens
        if wanted and first is not None and ids[:1] != [first]:
            return [first, *ids]
        return ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats, each block from the working context before it.

        Args:
            requests: the harness's instances, each of one text.
            disable_tqdm: show no progress.
        """
        results: list[float] = []
        for request in tqdm(requests, "Rolling loglikelihoods", disable=disable_tqdm):
            (text,) = request.args
            prefix = torch.tensor([self.prefix_token_id])
            targets = torch.tensor(self.tok_encode(text, add_special_tokens=False))
            scored = self.requests.score(prefix, targets.long(), rolling=True)
            results.append(float(scored.log_probs.double().sum()))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        self.requests.close()
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, which is left out.

        Args:
            requests: the harness's instances, each of a context and of generation settings.
            disable_tqdm: show no progress.

        Raises:
            ConfigError: a generation setting is unknown or not allowed.
        """
        results: list[str] = []
        for request in tqdm(requests, "Answers", disable=disable_tqdm):
            context, settings = request.args
            text = self._write(context, settings)
            results.append(final_answer(text) if self.config.strip_notes else text)
            self.cache_hook.add_partial("generate_until", (context, settings), results[-1])
        return results

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model."""
        return {
            "model_name": self.base.name,
            "model_dtype": str(self.base.dtype),
            "gist_version": self.session.gistnet.version,
            "policy": self.session.policy().name,
            "budget": self.max_length,
            "requests_beyond_budget": self.requests.beyond_window,
        }

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        for texts, context, targets in tqdm(requests, "Loglikelihoods", disable=disable_tqdm):
            scored = self.requests.score(
                torch.tensor(context or [self.prefix_token_id]),
                torch.tensor(targets, dtype=torch.int64),
            )
            results.append((float(scored.log_probs.double().sum()), scored.greedy))
            self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        self.requests.close()
        return results

    def _write(self, context: str, settings: dict[str, Any]) -> str:
        """The raw continuation of a text, cut at the first stop text."""
        options: dict[str, Any] = {**normalize_gen_kwargs(settings, self.max_gen_toks)}
        end = None if self.eot_token_id is None else self.base.decode([self.eot_token_id])
        stops = [stop for stop in handle_stop_sequences(options.pop("until"), end) if stop]
        limit = options.pop("max_gen_toks")
        # What has no effect is no mistake of the task's.
        if options.get("num_beams") == 1:
            del options["num_beams"]
        if not options["do_sample"]:
            options = {key: value for key, value in options.items() if key not in _SAMPLING_ONLY}
        ids = self.tok_encode(context) or [self.prefix_token_id]
        text = ""
        # Another seed for every request, or repeated ones would all be answered alike.
        seed = self.config.seed + self._answered
        self._answered += 1
        written = self.requests.write(
            torch.tensor(ids),
            max_new_tokens=limit,
            look_again=self.config.look_again,
            seed=seed,
            **options,
        )
        with closing(written) as tokens:
            for token in tokens:
                text += token.text
                found = [place for stop in stops if (place := text.find(stop)) >= 0]
                if found:
                    return text[: min(found)]
        return text


# No decorator: it would hide the class from type checkers.
register_model("megacontext")(MegaContextLM)
