#include "scheduler/scheduler_impl.h"
#include "slidecore/status.h"

namespace slidecore {

Ticket Scheduler::Impl::new_ticket() {
  retire_tickets();
  tickets.emplace_back();
  return first_ticket + tickets.size() - 1;
}

void Scheduler::Impl::issue_ticket(Ticket ticket, StreamHandle stream) {
  auto event = events.share();
  device->record(*event, stream);
  tickets[ticket - first_ticket] = std::move(event);
  changed.notify_all();
}

void Scheduler::Impl::check_ticket(Ticket ticket) const {
  if (ticket >= first_ticket + tickets.size()) {
    throw Error(Code::invalid_argument, "there is no ticket " + std::to_string(ticket));
  }
}

bool Scheduler::Impl::ticket_issued(Ticket ticket) const {
  return ticket < first_ticket || tickets[ticket - first_ticket] != nullptr;
}

std::shared_ptr<const EventHandle> Scheduler::Impl::ticket_event(Ticket ticket) const {
  return ticket < first_ticket ? nullptr : tickets[ticket - first_ticket];
}

// Tickets are retired oldest first; one that is done behind an unfinished one only holds its event a little longer.
void Scheduler::Impl::retire_tickets() {
  while (!tickets.empty() && tickets.front() != nullptr && device->done(*tickets.front())) {
    tickets.pop_front();
    ++first_ticket;
  }
}

}  // namespace slidecore
