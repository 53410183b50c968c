package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestAskerTellsFirstAndLastAnswer(t *testing.T) {
	const serves = 300 * time.Millisecond
	began := time.Now()
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if time.Since(began) > serves {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprintln(w, "page")
	}))
	defer page.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var out bytes.Buffer
	commands := "first tcp://" + l.Addr().String() + "\nlast " + page.URL + "\n"
	if err := askFromPlace(strings.NewReader(commands), &out); err != nil {
		t.Fatal(err)
	}
	var times []time.Time
	for _, text := range strings.Fields(out.String()) {
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			t.Fatal(err)
		}
		times = append(times, at)
	}
	if len(times) != 3 {
		t.Fatalf("times %v, want that of the listener and the page's first and last", times)
	}
	end := began.Add(serves)
	if !times[1].Before(end) || times[2].Before(times[1]) || times[2].After(end.Add(askLimit)) {
		t.Errorf("first answer %s, last %s before the end", end.Sub(times[1]), end.Sub(times[2]))
	}
}

func TestAskerWaitsForWhatGoes(t *testing.T) {
	const rules = "elements = { 10.82.0.10 . 02:f0:00:00:00:01 . 10.81.0.20 . udp . 51820 timeout 1m,\n\t10.84.0.2/32 . tcp . 80 }"
	for address, there := range map[string]bool{"10.82.0.10": true, "10.84.0.2": true, "10.81.0.20": true, "10.82.0.1": false, "10.84.0.22": false, "0.82.0.10": false} {
		if err := namedIn(rules, address); (err == nil) != there || err != nil && !errors.Is(err, errGone) {
			t.Errorf("%s: %v", address, err)
		}
	}
	looks, broken := 0, errors.New("no listing")
	if err := awaitGone(func() error {
		if looks++; looks < 3 {
			return nil
		}
		return fmt.Errorf("look: %w", errGone)
	}); err != nil || looks != 3 {
		t.Errorf("after %d looks: %v", looks, err)
	}
	if err := awaitGone(func() error { return broken }); !errors.Is(err, broken) {
		t.Errorf("a look that failed: %v", err)
	}
}

func TestClosingResults(t *testing.T) {
	r := closingResults("then", []closing{{10, 20, 30}, {900, 1001, 2}})
	if len(r) != 3 || r[0].Value != 900 || !*r[0].Met || r[1].Value != 1001 || *r[1].Met || r[2].Value != 30 || *r[2].Aim != aimRevoked {
		t.Errorf("%+v", r)
	}
}

func TestOnlyNamesMeasurements(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range names() {
		if seen[name] {
			t.Errorf("%s is there twice", name)
		}
		seen[name] = true
	}
	o := options{only: regexp.MustCompile("^(restarts|loader)$")}
	for name := range seen {
		if want := name == "restarts" || name == "loader"; o.wants(name) != want {
			t.Errorf("%s: wanted is %v", name, !want)
		}
	}
}
