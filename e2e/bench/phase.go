package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"foothold/dmz/ruleset"
	"foothold/dmz/upstream"
	"foothold/internal/command"
)

// insideNamespace marks the process that measures phase changes; its value is the number
// of rounds.
const insideNamespace = "FOOTHOLD_BENCH_NAMESPACE"

// phaseRounds is how often a VM goes to its next phase and back by the nft command. By
// our own means it goes ownRounds times as often: that is over sooner, and a p99 of few
// changes is their worst.
const (
	phaseRounds = 50
	ownRounds   = 10
)

// phaseChanges runs this program again in new user and network namespaces, where an
// ordinary user may set rules, and takes its results.
func phaseChanges(ctx context.Context, rounds int) ([]Result, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), insideNamespace+"="+strconv.Itoa(rounds))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("measure phase changes: %w", err)
	}
	var results []Result
	if err := json.Unmarshal(out, &results); err != nil {
		return nil, fmt.Errorf("measure phase changes: %w", err)
	}
	return results, nil
}

// measureInside prints the results for phaseChanges.
func measureInside(ctx context.Context) error {
	rounds, err := strconv.Atoi(os.Getenv(insideNamespace))
	if err != nil {
		return fmt.Errorf("%s: %w", insideNamespace, err)
	}
	var results []Result
	for _, n := range []int{10, 10000} {
		ours, nft, err := phaseChange(ctx, n, rounds)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("phase change, applied and read back, %d VMs, p99", n)
		results = append(results, atMost(name, p99(ours), "ms", aimPhase).against("nft", p99(nft)))
	}
	return json.NewEncoder(os.Stdout).Encode(results)
}

// phaseChange moves one VM between booting and unlocking while n others compute: by the
// firewall's own means, then by the nft command. Times are in ms.
func phaseChange(ctx context.Context, n, rounds int) (ours, nft []float64, err error) {
	until := upstream.Boottime() + time.Hour
	booting, unlocking := amongOthers(n, bootFlow(until)), amongOthers(n, sshFlow(until))
	table := ruleset.New(ruleset.Config{Adjacent: "vpc0", LogGroup: ruleset.LogGroup, Now: upstream.Boottime})
	for _, flows := range [][]ruleset.Flow{unlocking, booting} { // sets of both phases
		if err := table.Apply(ctx, flows); err != nil {
			return nil, nil, err
		}
	}
	for range ownRounds * rounds {
		for _, flows := range [][]ruleset.Flow{unlocking, booting} {
			began := time.Now()
			if err := table.Apply(ctx, flows); err != nil {
				return nil, nil, err
			}
			ours = append(ours, since(began)*1000)
		}
	}
	for range rounds {
		for _, c := range [][2][2]string{{bootElements, sshElements}, {sshElements, bootElements}} {
			began := time.Now()
			if err := changeByNft(ctx, c[0], c[1]); err != nil {
				return nil, nil, err
			}
			nft = append(nft, since(began)*1000)
		}
	}
	return ours, nft, nil
}

// The VM that moves.
var (
	movingVM  = ruleset.Endpoint{Prefix: netip.MustParsePrefix("10.83.0.10/32"), MAC: net.HardwareAddr{2, 0xf0, 0, 0, 0xff, 0x10}}
	bootHost  = ruleset.Endpoint{Prefix: netip.MustParsePrefix("10.81.0.10/32")}
	orchestra = ruleset.Endpoint{Prefix: netip.MustParsePrefix("10.80.0.10/32")}

	bootElements = [2]string{
		"vmcalls_32_32 { 10.83.0.10 . 02:f0:00:00:ff:10 . 10.81.0.10 . tcp . 443",
		"answers_32_32 { 10.81.0.10 . 10.83.0.10 . tcp . 443"}
	sshElements = [2]string{
		"calls_32_32 { 10.80.0.10 . 10.83.0.10 . tcp . 22",
		"vmanswers_32_32 { 10.83.0.10 . 02:f0:00:00:ff:10 . 10.80.0.10 . tcp . 22"}
)

func bootFlow(until time.Duration) ruleset.Flow {
	return ruleset.Flow{ID: "moving/1/boot", Reservation: "moving", From: movingVM, To: bootHost, Proto: "tcp", Port: 443, Until: until}
}

func sshFlow(until time.Duration) ruleset.Flow {
	return ruleset.Flow{ID: "moving/1/ssh", Reservation: "moving", From: orchestra, To: movingVM, Proto: "tcp", Port: 22, Until: until}
}

// amongOthers makes the flows of n computing VMs, and one in their middle.
func amongOthers(n int, moving ruleset.Flow) []ruleset.Flow {
	flows := make([]ruleset.Flow, 0, n+1)
	for i := range n {
		id := fmt.Sprintf("00000000-0000-4000-8000-%012d", i)
		flows = append(flows, ruleset.Flow{ID: id + "/1/wireguard", Reservation: id, Proto: "udp", Port: 51820, Until: moving.Until,
			From: ruleset.Endpoint{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 82, byte(i >> 8), byte(i)}), 32), MAC: net.HardwareAddr{2, 0xf0, 0, 0, byte(i >> 8), byte(i)}},
			To:   ruleset.Endpoint{Prefix: netip.MustParsePrefix("10.81.0.20/32")}})
	}
	return slices.Insert(flows, n/2, moving)
}

// changeByNft does the same with the nft command: one transaction, then a reading of
// the new elements.
func changeByNft(ctx context.Context, gone, come [2]string) error {
	var change, read strings.Builder
	for i := range gone {
		fmt.Fprintf(&change, "delete element inet foothold %s }\nadd element inet foothold %s timeout 1h comment \"moving\" }\n", gone[i], come[i])
		fmt.Fprintf(&read, "get element inet foothold %s }\n", come[i])
	}
	for _, commands := range []string{change.String(), read.String()} {
		cmd, err := command.New(ctx, "nft", "-f", "-")
		if err != nil {
			return err
		}
		cmd.Stdin = strings.NewReader(commands)
		if _, err := command.Wait(cmd); err != nil {
			return err
		}
	}
	return nil
}

// p99 of the values; of less than a hundred it is the worst.
func p99(values []float64) float64 {
	return round(slices.Sorted(slices.Values(values))[len(values)*99/100])
}
