-- +goose Up
-- Refusals that came before there was a quote to judge have a bundle too. No quote is made
-- over them, and they say nothing of a VM that is to be ended again.
ALTER TABLE bundles ADD COLUMN unjudged INTEGER NOT NULL DEFAULT 0;

-- +goose Down
SELECT 'the ledger is never migrated down';
