package ruleset

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"foothold/protocol/zone"

	"github.com/google/nftables"
)

// standing is n computing VMs, one flow each.
func standing(n int, until time.Duration) []Flow {
	flows := make([]Flow, n)
	for i := range flows {
		flows[i] = Flow{ID: fmt.Sprintf("00000000-0000-4000-8000-%012d/1/wireguard", i), Reservation: fmt.Sprintf("00000000-0000-4000-8000-%012d", i),
			From: Endpoint{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 82, byte(i >> 8), byte(i)}), 32), net.HardwareAddr{2, 0xf0, 0, 0, byte(i >> 8), byte(i)}},
			To:   Endpoint{Prefix: prefix("10.81.0.20/32")}, Proto: "udp", Port: 51820, Until: until}
	}
	return flows
}

// BenchmarkPhaseChange moves one VM from booting to unlocking and back while others
// compute.
func BenchmarkPhaseChange(b *testing.B) {
	for _, n := range []int{10, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			table := New(Config{Adjacent: "vpc0", LogGroup: 7, Now: boottime})
			until := boottime() + time.Hour
			others := standing(n, until)
			i := n / 2
			phases := [][]Flow{slices.Insert(slices.Clone(others), i, boot("boot", until)), slices.Insert(slices.Clone(others), i, ssh(until))}
			apply := func(flows []Flow) {
				if err := table.Apply(b.Context(), flows); err != nil {
					b.Fatal(err)
				}
			}
			apply(phases[1])
			var took []time.Duration
			for b.Loop() {
				began := time.Now()
				apply(phases[len(took)%2])
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		})
	}
}

// TestPhaseChangeAmongManyVMs: the kernel is asked about the VM that moves alone. It took
// the better part of a second when each change compared all sets.
func TestPhaseChangeAmongManyVMs(t *testing.T) {
	w := newWorld(t)
	until := boottime() + time.Hour
	others := standing(10000, until)
	w.apply(t, others...)
	w.fw.Do(t, func() error {
		var took []time.Duration
		for i := range 21 {
			flow := boot("boot", until)
			if i%2 == 1 {
				flow = ssh(until)
			}
			began := time.Now()
			if err := w.table.Apply(t.Context(), slices.Insert(slices.Clone(others), 5000, flow)); err != nil {
				return err
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		t.Logf("median %s", took[10])
		if took[10] > 100*time.Millisecond {
			t.Errorf("half of the changes took more than %s", took[10])
		}
		live, err := w.table.Live()
		if len(live) != 10001 || !slices.ContainsFunc(live, func(l zone.Live) bool { return l.ID == "boot" }) {
			t.Errorf("%d live", len(live))
		}
		return err
	})
}

// A table that somebody deleted is noticed, and made anew with the next flows.
func TestDeletedTableComesBack(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(t, "10.81.0.10:443")
	flow := boot("boot", boottime()+time.Minute)
	w.apply(t, flow)
	w.fw.Do(t, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.DelTable(&nftables.Table{Name: tableName, Family: nftables.TableFamilyINet})
		if err := conn.Flush(); err != nil {
			return err
		}
		if err := w.table.Reread(); err == nil {
			t.Error("not noticed")
		}
		return nil
	})
	w.apply(t, flow)
	w.vm.Passes(t, "10.81.0.10:443")
	w.dmz.Blocked(t, "10.82.0.10:22")
}

// Readings beside changes neither lose nor invent a flow.
func TestRereadBesideChanges(t *testing.T) {
	w := newWorld(t)
	until := boottime() + time.Hour
	others := standing(500, until)
	w.apply(t, others...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.fw.Do(t, func() error {
			for i := range 200 {
				if err := w.table.Apply(t.Context(), append(slices.Clone(others), boot(fmt.Sprint(i), until))); err != nil {
					t.Error(err)
				}
			}
			return nil
		})
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		w.fw.Do(t, w.table.Reread)
		live, err := w.table.Live()
		if n := len(live); err != nil || n < 500 || n > 501 {
			t.Fatalf("%d live, %v", n, err)
		}
	}
	w.table.mu.Lock()
	defer w.table.mu.Unlock()
	if !w.table.sure {
		t.Error("a change of ours was taken for another's")
	}
}
