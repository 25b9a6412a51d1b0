"""Responses of several turns: the model writes one, the environment answers, the model goes on.

Only ids travel: those that the model has sampled stay as they are, and those of an observation are appended to them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.rlhf.config.environment import Environment, with_observations
from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, Prompt, ResponseTurn
from components.rlhf.data.tokenizer import decode_response, encode_completion
from components.rlhf.environments.protocol import Host, Step
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.rewards.owner import max_failed, named
from components.rlhf.rollout.protocol import RolloutEngine
from components.rlhf.text.errors import InputError


@dataclass(kw_only=True)
class Episode:
    """A response while it is played."""

    prompt: Prompt
    seed: int
    budget: int  # tokens that the model may still write
    failure: str = ""
    over: bool = False
    truncated: bool = False
    reward: float = 0.0
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    turns: list[ResponseTurn] = field(default_factory=list)
    last: Completion | None = None  # the model's latest turn, as the engine has sampled it

    def say(self, ids: Sequence[int], text: str, logprobs: Tensor | None) -> None:
        """Append a turn: of the model with its log-probs, or of the environment."""
        start, is_model = len(self.ids), logprobs is not None
        self.ids += ids
        self.mask += [is_model] * len(ids)
        self.logprobs.append(torch.zeros(len(ids)) if logprobs is None else logprobs)
        speaker = "model" if is_model else "environment"
        self.turns.append(ResponseTurn(speaker=speaker, start=start, stop=len(self.ids), text=text))  # type: ignore[arg-type]


class Player:
    """Samples responses that an environment answers. Implements Sampler."""

    def __init__(
        self,
        engine: RolloutEngine,
        environment: Environment,
        host: Host,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.engine, self.environment, self.host, self.log = engine, environment, host, log

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int], *, greedy: bool = False
    ) -> list[Completion]:
        """One response to each prompt, of at most max_turns turns and, in all of them, max_new_tokens tokens of the model.

        A turn ends like a response: at a stop token, or at a stop string of sampling or of the environment. The response is over when the
        environment says so; it counts as truncated if the tokens or the turns are used up before. Raises InputError if the environment
        fails for more than a quarter of the responses.
        """
        episodes = [
            Episode(prompt=prompt, seed=seed, budget=sampling.max_new_tokens)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        stops = with_observations(sampling, self.environment).stop
        sampling = sampling.model_copy(update={"stop": stops})
        numbers = range(len(episodes))
        for number, failure in self.host.reset(dict(zip(numbers, prompts, strict=True))).items():
            episodes[number].failure = failure
        for turn in range(self.environment.max_turns):
            playing = {number: episodes[number] for number in numbers if not episodes[number].over}
            if not playing:
                break
            self._sample(list(playing.values()), sampling, turn, greedy=greedy)
            for episode in playing.values():
                episode.over = episode.truncated or bool(episode.failure)  # one that did not begin has a single turn
            asked = {number: episode for number, episode in playing.items() if not episode.over}
            steps = self.host.step({number: episode.turns[-1].text for number, episode in asked.items()})
            self._observe(asked, steps, is_last=turn + 1 == self.environment.max_turns)
        self.host.end(numbers)
        self._require_few_failures(episodes)
        return [self._completion(episode) for episode in episodes]

    def close(self) -> None:
        """End the environment; the engine stays."""
        self.host.close()

    def _sample(self, episodes: Sequence[Episode], sampling: SamplingConfig, turn: int, *, greedy: bool) -> None:
        """The next turn of the model in each of these episodes."""
        sampled = self.engine.generate(
            [episode.prompt for episode in episodes],
            sampling,
            # The first turn is the response that the engine alone would sample.
            [derive_seed("turn", episode.seed, turn) if turn else episode.seed for episode in episodes],
            greedy=greedy,
            after=[episode.ids for episode in episodes],
            limits=[episode.budget for episode in episodes],
        )
        for episode, found in zip(episodes, sampled, strict=True):
            assert found.logprobs is not None
            text = decode_response(self.engine.tokenizer, found.prompt_ids, found.response_ids)
            episode.say(found.response_ids, text, found.logprobs)
            episode.budget -= len(found.response_ids)
            episode.last, episode.truncated = found, found.truncated

    def _observe(self, episodes: Mapping[int, Episode], steps: Mapping[int, Step], *, is_last: bool) -> None:
        """Add what the environment says to the episodes that go on."""
        for number, episode in episodes.items():
            step = steps[number]
            episode.failure = step.failure
            episode.reward += step.reward
            episode.truncated = not step.done and not step.failure and (is_last or episode.budget == 0)
            episode.over = step.done or bool(step.failure) or episode.truncated
            if episode.over:
                continue  # nobody would read the observation
            ids = encode_completion(self.engine.tokenizer, step.observation)[: self.environment.max_observation_tokens]
            if ids:
                assert episode.last is not None
                context = [*episode.last.prompt_ids, *episode.last.response_ids]
                episode.say(ids, decode_response(self.engine.tokenizer, context, ids), None)

    def _completion(self, episode: Episode) -> Completion:
        last = episode.last
        assert last is not None
        # The last turn ends before its stop string, as a response of a single turn does.
        final = episode.turns.pop()
        turns = (*episode.turns, ResponseTurn(speaker="model", start=final.start, stop=final.stop, text=last.response))
        return Completion(
            prompt=episode.prompt,
            prompt_ids=last.prompt_ids[: len(last.prompt_ids) - final.start],
            response_ids=episode.ids,
            response="".join(turn.text for turn in turns),
            logprobs=torch.cat(episode.logprobs),
            truncated=episode.truncated,
            weight_version=last.weight_version,
            response_mask=episode.mask,
            turns=turns,
            environment_reward=episode.reward,
            failure=episode.failure,
        )

    def _require_few_failures(self, episodes: Sequence[Episode]) -> None:
        failed = [episode for episode in episodes if episode.failure]
        if not failed:
            return
        first = f"{len(failed)} of {len(episodes)} responses (the first is to prompt {named(failed[0].prompt)}: it {failed[0].failure})"
        if len(failed) > max_failed(len(episodes)):
            raise InputError(
                f"The environment fails for {first}; correct it, or raise ppo.environment.timeout_seconds."
            )
        self.log(f"environment: no learning from {first}")
