package ledger

import (
	"errors"
	"testing"

	"foothold/protocol/digest"
)

// TestDocuments: each is kept as it came; one version of the inventory is one document; a
// withdrawal is one swap, and stays.
func TestDocuments(t *testing.T) {
	l, _ := openTest(t)
	sum := func(text string) digest.SHA256 { return digest.Of([]byte(text)) }
	write := func(f func(*Tx) error) error { return l.Write(t.Context(), f) }
	add := func(kind, text string, version int) error {
		return write(func(t *Tx) error {
			return t.AddDocument(Document{Kind: kind, SHA256: sum(text), Version: version, Envelope: []byte(text), ImportedBy: "alice"})
		})
	}
	for _, c := range []struct {
		kind, text string
		version    int
		good       bool
	}{
		{InventoryDocument, "v1", 1, true}, {InventoryDocument, "v3", 3, true}, {InventoryDocument, "v2", 2, true},
		{InventoryDocument, "another v3", 3, false}, {InventoryDocument, "v3", 4, false},
		{PlatformDocument, "a", 0, true}, {PlatformDocument, "b", 0, true}, {PlatformDocument, "a", 0, false}, {"other", "c", 0, false},
	} {
		if err := add(c.kind, c.text, c.version); (err == nil) != c.good {
			t.Errorf("%s %q: %v", c.kind, c.text, err)
		}
	}
	withdraw := func() (done bool) {
		if err := write(func(t *Tx) (err error) {
			done, err = t.WithdrawDocument(PlatformDocument, sum("a"), "bob", "a hole")
			return err
		}); err != nil {
			t.Error(err)
		}
		return done
	}
	if !withdraw() || withdraw() {
		t.Error("a withdrawal is not one swap")
	}
	err := l.Read(t.Context(), func(tx *Tx) error {
		newest, err := tx.NewestInventory()
		if err != nil || newest.Version != 3 || string(newest.Envelope) != "v3" || newest.ImportedBy != "alice" || newest.Imported.IsZero() {
			t.Errorf("newest: %+v, %v", newest, err)
		}
		if _, err := tx.Inventory(4); !errors.Is(err, ErrNotFound) {
			t.Errorf("version 4: %v", err)
		}
		if _, err := tx.Document(InventoryDocument, sum("a")); !errors.Is(err, ErrNotFound) {
			t.Errorf("reference values as an inventory: %v", err)
		}
		a, err := tx.Document(PlatformDocument, sum("a"))
		if err != nil || a.Withdrawn.IsZero() || a.WithdrawnBy != "bob" || a.Why != "a hole" {
			t.Errorf("withdrawn: %+v, %v", a, err)
		}
		list, err := tx.Documents(PlatformDocument)
		if err != nil || len(list) != 2 || list[0].SHA256 != sum("b") || !list[0].Withdrawn.IsZero() {
			t.Errorf("list: %+v, %v", list, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestHostKeysAreKept: good and bad ones of one host, those named last first.
func TestHostKeysAreKept(t *testing.T) {
	l, _ := openTest(t)
	old, now := digest.Of([]byte("old")), digest.Of([]byte("new"))
	err := l.Write(t.Context(), func(tx *Tx) error {
		return errors.Join(
			tx.PutHostKeys(HostKeys{Host: "a", Keys: old, API: "10.0.0.1:1", Inventory: 1, State: KeysValidated}),
			tx.PutHostKeys(HostKeys{Host: "b", Keys: old, API: "10.0.0.2:1", Inventory: 1, State: KeysUnproved}),
			tx.PutHostKeys(HostKeys{Host: "a", Keys: now, API: "10.0.0.3:1", Inventory: 2, State: KeysUnproved}),
			tx.PutHostKeys(HostKeys{Host: "a", Keys: now, API: "10.0.0.3:1", Inventory: 3, State: KeysFailed, Reason: "not its own"}))
	})
	if err != nil {
		t.Fatal(err)
	}
	err = l.Read(t.Context(), func(tx *Tx) error {
		list, err := tx.AllHostKeys()
		if err != nil || len(list) != 3 || list[0].Keys != now || list[0].Inventory != 3 || list[0].State != KeysFailed || list[0].Reason != "not its own" || list[1].Keys != old {
			t.Errorf("%+v, %v", list, err)
		}
		if _, err := tx.HostKeys("b", now); !errors.Is(err, ErrNotFound) {
			t.Errorf("another host's: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if l.Write(t.Context(), func(tx *Tx) error { return tx.PutHostKeys(HostKeys{Host: "a", Keys: now, State: "perhaps"}) }) == nil {
		t.Error("an unknown state was stored")
	}
}
