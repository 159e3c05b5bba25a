import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from ulmfit_tools.errors import InputError
from ulmfit_tools.sampling import EpochLengthGroupedSampler, LongestFirstSampler, length_grouped_order, row_lengths

ROWS = 1603


def lengths_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 200, (rows,), generator=torch.Generator().manual_seed(seed))


def batches_of(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(lengths: torch.Tensor, order: list[int], size: int) -> int:
    """Tokens computed, padding included."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches_of(order, size))


class TestOrder:
    @pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 64, 100, 1003])
    @pytest.mark.parametrize("epoch", [0, 3])
    def test_each_row_once(self, rows, epoch):
        order = length_grouped_order(lengths_of(rows), 8, seed=0, epoch=epoch)
        assert sorted(order) == list(range(rows))

    def test_a_function_of_seed_and_epoch_only(self):
        lengths = lengths_of(300)
        first = length_grouped_order(lengths, 8, seed=5, epoch=2)
        torch.manual_seed(99)
        torch.rand(5)
        state = torch.random.get_rng_state()
        assert length_grouped_order(lengths, 8, seed=5, epoch=2) == first
        assert torch.equal(torch.random.get_rng_state(), state)
        others = [length_grouped_order(lengths, 8, seed=s, epoch=e) for s, e in [(5, 3), (6, 2), (2, 5), (7, 0)]]
        assert all(other != first for other in others)

    def test_batches_are_of_similar_length(self):
        lengths = lengths_of(3200)
        tokens = int(lengths.sum())
        ours = padded(lengths, length_grouped_order(lengths, 32, seed=0, epoch=0), 32)
        shuffled = padded(lengths, torch.randperm(3200, generator=torch.Generator().manual_seed(0)).tolist(), 32)
        assert ours < 1.06 * tokens
        assert shuffled > 1.8 * tokens

    def test_batches_come_in_random_order(self):
        """Not sorted within the groups in which they were sorted: neighbours are no closer than any two batches."""
        lengths = lengths_of(3200)
        order = length_grouped_order(lengths, 32, seed=0, epoch=0)
        longest = torch.tensor([float(lengths[batch].max()) for batch in batches_of(order, 32)])
        neighbours = (longest[1:] - longest[:-1]).abs().mean()
        any_two = (longest[:, None] - longest[None, :]).abs().mean()
        assert neighbours > 0.7 * any_two

    @pytest.mark.parametrize("epoch", range(5))
    def test_the_longest_row_is_in_the_first_batch(self, epoch):
        lengths = lengths_of(203)
        lengths[17] = 500
        assert 17 in length_grouped_order(lengths, 8, seed=0, epoch=epoch)[:8]

    def test_rows_that_fill_no_batch_are_drawn_from_all(self):
        """They are dropped with drop_last, so they must not be the shortest; the mean of 1..199 is 100."""
        lengths = lengths_of(1007)
        rest = [length_grouped_order(lengths, 16, seed=0, epoch=epoch)[-15:] for epoch in range(60)]
        assert float(lengths[rest].float().mean()) == pytest.approx(100, abs=6)

    def test_a_short_last_batch_does_not_shift_the_others(self):
        lengths = torch.tensor([10] * 12 + [90] * 12 + [50])
        batches = batches_of(length_grouped_order(lengths, 4, seed=1, epoch=0), 4)
        assert all(len({int(lengths[row]) for row in batch}) == 1 for batch in batches[:-1]) or len(batches[-1]) == 1
        assert [len(batch) for batch in batches] == [4] * 6 + [1]


class TestSampler:
    def test_gives_the_order_of_its_epoch(self):
        lengths = lengths_of(50)
        sampler = EpochLengthGroupedSampler(lengths.tolist(), 8, seed=3)
        assert len(sampler) == 50
        assert list(sampler) == length_grouped_order(lengths, 8, seed=3, epoch=0)
        sampler.set_epoch(4)
        assert list(sampler) == length_grouped_order(lengths, 8, seed=3, epoch=4)
        assert list(sampler) == list(sampler)

    def test_upstreams_order_depends_on_the_global_random_numbers(self):
        """Why this sampler exists: resumed in mid-epoch, `Trainer` sees the rows of that epoch in another order."""
        sampler = LengthGroupedSampler(8, lengths=lengths_of(50).tolist())
        torch.manual_seed(42)
        first_epoch, second_epoch = list(sampler), list(sampler)
        torch.manual_seed(42)  # a resumed process begins with the run's seed, and goes straight to the second epoch
        assert list(sampler) == first_epoch
        assert first_epoch != second_epoch

    def test_longest_first(self):
        assert list(LongestFirstSampler([3, 9, 5, 9])) == [1, 3, 2, 0]
        assert len(LongestFirstSampler([3, 9, 5])) == 3

    def test_refuses_no_batch(self):
        with pytest.raises(InputError, match="batch_size=0"):
            EpochLengthGroupedSampler([1, 2], 0)


class TestWithAccelerate:
    """What reaches the sampler when a `DataLoader` is prepared for one process and for two."""

    def loader(self, processes: int, process: int, together: int | None = None):
        lengths = lengths_of(ROWS)
        sampler = EpochLengthGroupedSampler(lengths, together or 4 * processes, seed=1)
        loader = DataLoader(torch.arange(ROWS), batch_size=4, sampler=sampler)
        return prepare_data_loader(loader, num_processes=processes, process_index=process), lengths

    def read(self, loader, epoch) -> list[list[int]]:
        loader.set_epoch(epoch)
        return [batch.tolist() for batch in loader]

    def test_one_process(self):
        loader, lengths = self.loader(1, 0)
        order = length_grouped_order(lengths, 4, seed=1, epoch=2)
        assert self.read(loader, 2) == batches_of(order, 4)
        assert self.read(skip_first_batches(loader, 5), 2) == batches_of(order, 4)[5:]

    def test_two_processes_share_one_order_and_work_on_similar_lengths(self):
        (first, lengths), (second, _) = self.loader(2, 0), self.loader(2, 1)
        order = length_grouped_order(lengths, 8, seed=1, epoch=2)
        pairs = list(zip(self.read(first, 2), self.read(second, 2), strict=True))
        assert [a + b for a, b in pairs[:-1]] == batches_of(order, 8)[:-1]
        assert {row for pair in pairs for batch in pair for row in batch} == set(range(ROWS))
        gaps = [abs(int(lengths[a].max()) - int(lengths[b].max())) for a, b in pairs[:-1]]
        assert sum(gaps) / len(gaps) < 5

    def test_two_processes_in_a_resumed_epoch(self):
        """Accelerate's `set_epoch` does not reach a sampler behind both the sharding and the skipping by itself."""
        loader, lengths = self.loader(2, 0)
        first_epoch, third_epoch = (
            batches_of(length_grouped_order(lengths, 8, seed=1, epoch=epoch), 8) for epoch in (0, 2)
        )
        assert self.read(skip_first_batches(loader, 5), 2)[0] == first_epoch[5][:4]
        loader.set_sampler(loader.batch_sampler.batch_sampler.sampler)  # what ULMFiTTrainer does about it
        assert self.read(skip_first_batches(loader, 5), 2)[0] == third_epoch[5][:4]


class TestRowLengths:
    LIST = [{"input_ids": [1] * length, "labels": 0} for length in (3, 1, 2)]

    def test_of_a_list_of_rows(self):
        assert row_lengths(self.LIST).tolist() == [3, 1, 2]

    def test_of_a_dataset_in_its_present_order(self):
        dataset = datasets.Dataset.from_list(self.LIST)
        assert row_lengths(dataset).tolist() == [3, 1, 2]
        assert row_lengths(dataset.select([2, 0])).tolist() == [2, 3]
        assert row_lengths(dataset.with_format("torch")).tolist() == [3, 1, 2]

    def test_a_column_of_lengths_wins_where_asked_for(self):
        dataset = datasets.Dataset.from_list(self.LIST).add_column("length", [7, 8, 9])
        assert row_lengths(dataset, length_column="length").tolist() == [7, 8, 9]
        assert row_lengths(dataset).tolist() == [3, 1, 2]

    def test_of_rows_made_on_the_fly(self):
        dataset = datasets.Dataset.from_dict({"text": ["aaa", "b"]})
        dataset.set_transform(lambda batch: {"input_ids": [list(map(ord, text)) for text in batch["text"]]})
        assert row_lengths(dataset).tolist() == [3, 1]

    def test_of_nothing(self):
        assert row_lengths([]).tolist() == []

    @pytest.mark.parametrize(("rows", "received"), [([{"pixels": [1]}], "rows with pixels"), ([(1, 2)], "type tuple")])
    def test_rows_without_it(self, rows, received):
        with pytest.raises(InputError, match=f"train_sampling_strategy random.*{received}"):
            row_lengths(rows)
