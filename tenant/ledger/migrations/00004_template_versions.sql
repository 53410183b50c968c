-- +goose Up
-- A template has versions: rotation adds one, and withdraws the old one when nothing uses
-- it. A VM's version is that of its latest start, 0 before the first.
CREATE TABLE templates_new (
    name        TEXT NOT NULL,
    version     INTEGER NOT NULL,
    sha256      TEXT NOT NULL,
    size        INTEGER NOT NULL,
    root_hash   TEXT NOT NULL,
    hash_offset INTEGER NOT NULL,
    release     TEXT NOT NULL,
    components  BLOB NOT NULL, -- JSON of the signed envelope
    audit       BLOB NOT NULL, -- JSON of the expectations
    created     INTEGER NOT NULL,
    withdrawn   INTEGER NOT NULL, -- when its withdrawal began
    gone        INTEGER NOT NULL, -- 1: its key and ciphertexts are gone; the row stays, so that its image does not come back
    PRIMARY KEY (name, version)
) STRICT;
INSERT INTO templates_new SELECT name, 1, sha256, size, root_hash, hash_offset, release, components, audit, created, 0, 0 FROM templates;
CREATE TABLE template_hosts_new (
    template TEXT NOT NULL,
    version  INTEGER NOT NULL,
    host     TEXT NOT NULL,
    PRIMARY KEY (template, version, host),
    FOREIGN KEY (template, version) REFERENCES templates_new (name, version) ON DELETE CASCADE
) STRICT;
INSERT INTO template_hosts_new SELECT template, 1, host FROM template_hosts;
DROP TABLE template_hosts;
DROP TABLE templates;
ALTER TABLE templates_new RENAME TO templates;
ALTER TABLE template_hosts_new RENAME TO template_hosts;
ALTER TABLE reservations ADD COLUMN version INTEGER NOT NULL DEFAULT 1;

-- +goose Down
SELECT 'the ledger is never migrated down';
