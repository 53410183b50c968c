package main

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"foothold/e2e/bench/site"

	"golang.org/x/sys/unix"
)

// Sizes of the measurement of boot requests.
const (
	requestRounds = 3
	// requestBatch VMs boot at once; the boot server holds 512 connections.
	requestBatch = 400
	// requestLoaders connect at the same time.
	requestLoaders = 32
	// requestHosts have a TPM each. A TPM is one thread and does one VM after the other.
	requestHosts = 4
)

// bootRequests is how many VMs a second get their grant: TLS 1.3 in full with a client
// certificate made for it, T1 spent by the orchestrator, the TPM's session and quote
// through the tunnel and the provider's broker, the quote judged. VMs, hosts and the TPMs'
// processes share this machine's processors with the daemons. So two parts are given on
// their own: how many a second spend T1, without a TPM; and the TPM's time for each VM,
// which elsewhere a chip takes and not a processor. The processor's time for all else says
// more than a rate on a machine that does other work too.
func bootRequests(ctx context.Context, o options) (results []Result, err error) {
	part := make([]byte, 64<<10)
	s, err := site.Open(ctx, site.Options{Dir: filepath.Join(o.work, "requests"), Hosts: requestHosts, Kernel: part, Initramfs: part[1:]})
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := s.Close(); err == nil {
			err = cerr
		}
	}()
	open := func(_ context.Context, l *site.Loader) error { return l.Open() }
	attest := func(ctx context.Context, l *site.Loader) error { return l.Attest(ctx, s) }
	var opened, whole, tpm, rest []float64
	for range requestRounds {
		spent, err := requests(ctx, s, []step{open}, []step{attest})
		if err != nil {
			return nil, err
		}
		opened = append(opened, requestBatch/spent.clock)
		if spent, err = requests(ctx, s, []step{open, attest}, nil); err != nil {
			return nil, err
		}
		whole = append(whole, requestBatch/spent.clock)
		tpm, rest = append(tpm, spent.tpm*1000/requestBatch), append(rest, spent.rest*1000/requestBatch)
	}
	return []Result{
		atLeast("boot requests, to the grant", median(whole), "per second", aimBoots),
		atLeast("boot requests, to T1 spent", median(opened), "per second", aimBoots),
		{Name: "boot requests, processor time of the software TPM for each", Value: median(tpm), Unit: "ms"},
		{Name: "boot requests, processor time of daemons, hosts and loaders for each", Value: median(rest), Unit: "ms"},
	}, nil
}

// times of one batch, in seconds: by the clock, and of the processor, for the TPMs and for
// this process, in which all else is.
type times struct{ clock, tpm, rest float64 }

func (t times) minus(u times) times { return times{t.clock - u.clock, t.tpm - u.tpm, t.rest - u.rest} }

func timesNow(s *site.Site) (times, error) {
	var own unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &own); err != nil {
		return times{}, fmt.Errorf("read own processor time: %w", err)
	}
	tpm, err := s.TPMTime()
	return times{float64(time.Now().UnixNano()) / 1e9, tpm.Seconds(), float64(own.Utime.Nano()+own.Stime.Nano()) / 1e9}, err
}

// step is a part of a loader's conversation.
type step func(context.Context, *site.Loader) error

// requests boots one batch. What is timed is the connecting and the first steps; then come
// the others, and the end as a VM makes it that boots on.
func requests(ctx context.Context, s *site.Site, timed, untimed []step) (spent times, err error) {
	vms, err := s.Reserve(ctx, requestBatch)
	if err != nil {
		return times{}, err
	}
	loaders := make([]*site.Loader, len(vms))
	began, err := timesNow(s)
	if err != nil {
		return times{}, err
	}
	if err := each(len(vms), requestLoaders, func(i int) (err error) {
		if loaders[i], err = s.Dial(ctx, vms[i]); err != nil {
			return err
		}
		return walk(ctx, loaders[i], timed)
	}); err != nil {
		return times{}, err
	}
	ended, err := timesNow(s)
	if err != nil {
		return times{}, err
	}
	return ended.minus(began), each(len(vms), requestLoaders, func(i int) error {
		if err := walk(ctx, loaders[i], untimed); err != nil {
			return err
		}
		return loaders[i].Finish()
	})
}

func walk(ctx context.Context, l *site.Loader, steps []step) error {
	for _, f := range steps {
		if err := f(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// each calls f for 0 to n-1, with so many calls at the same time, until one fails. It
// returns the first failure.
func each(n, together int, f func(int) error) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	next, failed := 0, error(nil) // guarded by mu
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		next++
		return next - 1, failed == nil && next <= n
	}
	for range together {
		wg.Go(func() {
			for i, ok := take(); ok; i, ok = take() {
				if err := f(i); err != nil {
					mu.Lock()
					if failed == nil {
						failed = fmt.Errorf("%d of %d: %w", i+1, n, err)
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return failed
}
