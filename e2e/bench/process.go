package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/token"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// Sizes of the runs: long enough that the clock's and the disk's noise evens out.
const (
	uniqueRuns = 2000
	spendRuns  = 2000
)

// uniquePart is the median time to build a VM's part of the initramfs.
func uniquePart() ([]Result, error) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	u := bootmsg.Unique{
		Reservation: "0b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911", Start: 1, Name: "web", Account: "u-0b6c2f4e5a7d4c1b",
		AuthorizedKey: key.Public().(ed25519.PublicKey), T2: token.New(token.T2), BootURL: "https://10.81.0.10:443",
		ServerName: "boot.foothold.internal", BootCA: make([]byte, 600), ManifestKey: key.Public().(ed25519.PublicKey),
		Network: bootmsg.Network{MAC: "02:fb:00:00:00:10", Address: netip.MustParsePrefix("10.82.0.10/24"),
			Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		Orchestrator: netip.MustParseAddr("10.80.0.10"),
	}
	var times []float64
	for range uniqueRuns {
		began := time.Now()
		text, err := json.Marshal(u)
		if err != nil {
			return nil, fmt.Errorf("measure unique part: %w", err)
		}
		if _, err := bundle.Archive(bundle.File{Path: bundle.UniquePath, Data: text}); err != nil {
			return nil, fmt.Errorf("measure unique part: %w", err)
		}
		times = append(times, since(began)*1000)
	}
	return []Result{atMost("unique part, build", median(times), "ms", aimUnique)}, nil
}

// tokenSpends is how many tokens the ledger spends a second, each durably before the next
// one and many at a time, which share commits: the ledger's file lies on the disk.
func tokenSpends(ctx context.Context, file string) ([]Result, error) {
	l, err := ledger.Open(ctx, file, time.Now)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	tokens, err := openTokens(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("measure spends: %w", err)
	}
	alone, crowd := tokens[:spendRuns], tokens[spendRuns:]
	spend := func(list []ledger.Presentation, together int) (perSecond float64, err error) {
		began := time.Now()
		if err := each(len(list), together, func(i int) error {
			_, err := l.Spend(ctx, list[i], func(*ledger.Tx, ledger.Reservation) error { return nil })
			return err
		}); err != nil {
			return 0, fmt.Errorf("measure spends: %w", err)
		}
		return float64(len(list)) / since(began), nil
	}
	one, err := spend(alone, 1)
	if err != nil {
		return nil, err
	}
	many, err := spend(crowd, requestLoaders)
	if err != nil {
		return nil, err
	}
	return []Result{
		atLeast("token spends", one, "per second", aimSpends),
		atLeast(fmt.Sprintf("token spends, %d at a time", requestLoaders), many, "per second", aimSpends),
	}, nil
}

// openTokens stores twice as many booting reservations as there are spends in a run, each
// with an open T1.
func openTokens(ctx context.Context, l *ledger.Ledger) (list []ledger.Presentation, err error) {
	deadline := time.Now().Add(time.Hour)
	err = l.Write(ctx, func(tx *ledger.Tx) error {
		for i := range 2 * spendRuns {
			t := token.New(token.T1)
			r := ledger.Reservation{ID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), Name: fmt.Sprintf("vm%d", i), Template: "debian", Restart: reservation.Never,
				Size: "small", MemoryMiB: 1024, Start: 1, Deadline: deadline, MAC: "02:00:00:00:00:01",
				Address: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), Volume: fmt.Sprintf("10000000-0000-4000-8000-%012d", i)}
			if err := errors.Join(tx.AddReservation(r), tx.PutStart(r.ID, 1, ledger.Start{}),
				tx.Move(r.ID, 1, reservation.Reserved, reservation.Booting, deadline),
				tx.AddToken(ledger.Token{Digest: t.Digest(), Kind: token.T1, Reservation: r.ID, Start: 1, Phase: reservation.Booting, Source: r.Address})); err != nil {
				return err
			}
			list = append(list, ledger.Presentation{Kind: token.T1, Digest: t.Digest(), Source: r.Address})
		}
		return nil
	})
	return list, err
}
